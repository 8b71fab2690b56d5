"""Weights by themselves, which a run can begin with: a folder of torch DCP shards.

A checkpoint of a run is such a folder too, whose optimizer state is left alone.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from farspan.trainer.checkpoint.shards import INDEX, read_index, read_shards, write_shards
from farspan.trainer.checkpoint.verify import verified
from farspan.trainer.resilience.agreement import on_first_rank, raise_on_all_ranks

PREFIX = "model."
"""Of the names of parameters in a folder, where an optimizer's state may be beside them."""


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, with the weights in `folder`; every rank makes the same call.

    Raises CheckpointError where there are none, or they are those of another model, which may be half filled then.
    """
    raise_on_all_ranks(lambda: check_weights(folder))
    tensors = {"model": get_model_state_dict(model)}
    # Only a run's checkpoint has a manifest.
    files = on_first_rank(lambda: Manifest.read(folder).files if (folder / MANIFEST).is_file() else {})
    try:
        with verified(folder, files):
            read_shards(tensors, folder)
    except DamagedError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{folder} does not fill this model ({error}): change model.*.") from None
    raise_on_all_ranks(lambda: _check_all_taken(folder, tensors["model"]))
    set_model_state_dict(model, tensors["model"])


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where `folder` is no folder of weights."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))


def _check_all_taken(folder: Path, tensors: Mapping[str, object]) -> None:
    """A model of fewer layers, or without a norm, takes from a larger one what it can: it would be another model."""
    left = [name for name in StoredWeights(folder).names if name not in tensors]
    if left:
        raise CheckpointError(
            f"{folder} holds weights that this model does not have ({left[0]}{', ...' if len(left) > 1 else ''}): "
            "change model.*."
        )


class StoredWeights:
    """Whole tensors of a folder of weights, on the CPU, read by the only rank, no more at once than are asked for."""

    def __init__(self, folder: Path) -> None:
        """Read what there is; raises CheckpointError for a folder without weights, or with damaged ones."""
        check_weights(folder)
        try:
            stored = read_index(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} is damaged ({error}): write it anew.") from None
        self._folder = folder
        self._tensors = {
            name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)
        }

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._tensors)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError unless there is a tensor of each name, and of its shape."""
        for name, shape in shapes.items():
            stored = self._tensors.get(name)
            if stored is None or stored.size != shape:
                found = "is missing" if stored is None else f"has shape {list(stored.size)}, not {list(shape)}"
                raise CheckpointError(
                    f"{self._folder} does not fill the model that its configuration describes ({name} {found}): "
                    "restore its model section, or write it anew."
                )

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return self._tensors[name].properties.dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors; raises CheckpointError where one cannot be read."""
        tensors = {name: torch.empty(self._tensors[name].size, dtype=self.dtype_of(name)) for name in names}
        try:
            read_shards({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, self._folder)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder} is damaged ({error}): write it anew.") from None
        return tensors


def save_weights(tensors: Mapping[str, Tensor], folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write whole tensors, and files of text beside them, from the only rank.

    Raises CheckpointError where `folder` exists or cannot be written.
    """
    with new_folder(folder) as partial:
        try:
            write_shards({"model": tensors}, partial)
        except CheckpointError as error:
            raise CheckpointError(_not_written(folder, str(error))) from None
        for name, text in (texts or {}).items():
            (partial / name).write_text(text)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into, which becomes `folder` when the block is done.

    Raises CheckpointError where `folder` exists or cannot be written; nothing is left behind then.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: name another folder, or delete it.")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(_not_written(folder, error.strerror or str(error))) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _no_weights(folder: Path) -> str:
    return (
        f"{folder} holds no weights: name a folder that `farspan upcycle` or `farspan import` wrote, or one step below "
        "a run's checkpoints/."
    )


def _not_written(folder: Path, cause: str) -> str:
    return f"{folder} cannot be written ({cause}): make room, or name another folder."
