"""Weights without a run, for a run to start from: a folder of torch DCP shards.

A checkpoint of a run is such a folder, too; its optimizer state is not read.
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
"""Prefix of parameter names in a folder, which may contain optimizer state, too."""


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, with the weights in `folder`; every rank makes the same call.

    Raises CheckpointError where there are none, or those of another model; `model` may be half filled then.
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
    raise_on_all_ranks(lambda: _check_all_used(folder, tensors["model"]))
    set_model_state_dict(model, tensors["model"])


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where `folder` has no weights."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no weights: name a folder that `farspan upcycle` or `farspan import` wrote, or one step "
            "in a run's checkpoints/."
        )


def _check_all_used(folder: Path, tensors: Mapping[str, object]) -> None:
    """DCP lets a model with fewer layers, or without a norm, load a part of a larger one: that is another model."""
    unused = [name for name in StoredWeights(folder).names if name not in tensors]
    if unused:
        raise CheckpointError(
            f"{folder} holds weights that this model does not have ({unused[0]}{', ...' if len(unused) > 1 else ''}): "
            "change model.*."
        )


class StoredWeights:
    """Full tensors of a folder of weights, on the CPU of a single rank; `read` loads only those asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises CheckpointError for a folder without weights, or with a damaged index."""
        check_weights(folder)
        try:
            stored = read_index(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} is damaged ({error}): write it again.") from None
        self._folder = folder
        self._tensors = {
            name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)
        }

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError unless there is a tensor of each name and shape."""
        for name, shape in shapes.items():
            stored = self._tensors.get(name)
            if stored is None or stored.size != shape:
                problem = "is missing" if stored is None else f"has shape {list(stored.size)}, not {list(shape)}"
                raise CheckpointError(
                    f"{self._folder} does not fill the model that its configuration describes ({name} {problem}): "
                    "restore its model section, or write it again."
                )

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors; raises CheckpointError where one cannot be read."""
        tensors = {name: torch.empty(self._tensors[name].size, dtype=self.dtype_of(name)) for name in names}
        try:
            read_shards({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, self._folder)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder} is damaged ({error}): write it again.") from None
        return tensors


def save_weights(tensors: Mapping[str, Tensor], folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write full tensors, and text files beside them, from a single rank.

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
    """Yield a hidden folder to write into; it becomes `folder` at the end of the block.

    Raises CheckpointError where `folder` exists or cannot be written, and leaves nothing then.
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


def _not_written(folder: Path, cause: str) -> str:
    return f"{folder} cannot be written ({cause}): make room, or name another folder."
