"""Weights by themselves, which a run can begin with: a folder of torch DCP shards.

A checkpoint of a run is such a folder too, whose optimizer state is left alone.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from farspan.kernels.errors import CheckpointError
from farspan.trainer.agreement import together
from farspan.trainer.checkpoint import causes

WRITTEN_LAST = ".metadata"


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, with the weights in `folder`; every rank makes the same call.

    Raises CheckpointError where there are none, or they are those of another model, which may be half filled then.
    """
    together(lambda: _check_there(folder))
    tensors = {"model": get_model_state_dict(model)}
    try:
        load_shards(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} does not fill this model ({causes(error)}): change model.*.") from None
    together(lambda: _check_all_taken(folder, tensors["model"]))
    set_model_state_dict(model, tensors["model"])


def _check_there(folder: Path) -> None:
    if not (folder / WRITTEN_LAST).is_file():
        raise CheckpointError(
            f"{folder} holds no weights: name a folder that `farspan upcycle` wrote, or one step below a run's "
            "checkpoints/."
        )


def _check_all_taken(folder: Path, tensors: Mapping[str, object]) -> None:
    """A model of fewer layers, or without a norm, takes from a larger one what it can: it would be another model."""
    written = FileSystemReader(folder).read_metadata().state_dict_metadata
    names = sorted(name.removeprefix("model.") for name in written if name.startswith("model."))
    left = [name for name in names if name not in tensors]
    if left:
        raise CheckpointError(
            f"{folder} holds weights that this model does not have ({left[0]}{', ...' if len(left) > 1 else ''}): "
            "change model.*."
        )


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write whole tensors, from the only rank; raises CheckpointError where `folder` exists or cannot be written."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: name another folder, or delete it.")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_shards({"model": dict(tensors)}, checkpoint_id=partial)
        partial.rename(folder)
    except (OSError, CheckpointException) as error:
        cause = causes(error) if isinstance(error, CheckpointException) else error.strerror or error
        raise CheckpointError(f"{folder} cannot be written ({cause}): make room, or name another folder.") from None
