"""Checkpoints: every rank's shards through torch DCP, and a manifest that is written last.

    checkpoints/step_00000100/   __0_0.distcp __1_0.distcp .metadata   parameters and optimizer state
                                 manifest.json                         format, TrainState
A checkpoint is written under a hidden name and renamed when it is whole: a folder with its final name is complete.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from farspan.kernels.errors import CheckpointError
from farspan.trainer.state import TrainState

FORMAT = 1
MANIFEST = "manifest.json"


class Checkpointer:
    """Saves and loads one model and its optimizer in `folder`; every rank makes the same calls."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> None:
        self._folder = folder
        self._model, self._optimizer = model, optimizer
        self._keep = keep

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of `state.step` and drop the oldest beyond `keep`; return its folder."""
        final = self._folder / f"step_{state.step:08d}"
        partial = self._folder / f".{final.name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dcp.save(self._tensors(), checkpoint_id=partial)
        if dist.get_rank() == 0:
            _write_durably(partial / MANIFEST, {"format": FORMAT, "train_state": state.state_dict()})
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self._folder)
            for old in self._finished()[: -self._keep]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load_latest(self, state: TrainState) -> Path | None:
        """Load the newest checkpoint into model, optimizer and `state`; return its folder, None if there is none.

        Raises CheckpointError when it cannot be read, or is of another model, seed or data.
        """
        finished = self._finished()
        if not finished:
            return None
        newest = finished[-1]
        saved = _read_manifest(newest)
        _check_same_run(newest, saved, state)
        tensors = self._tensors()
        try:
            dcp.load(tensors, checkpoint_id=newest)
        except CheckpointException as error:
            causes = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
            raise CheckpointError(
                f"checkpoint {newest} does not fit or is damaged ({causes}): start from another one by deleting it, "
                "or start anew with another run.folder."
            ) from None
        set_state_dict(
            self._model, self._optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
        )
        state.load_state_dict(saved)
        return newest

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def _finished(self) -> list[Path]:
        return sorted(self._folder.glob("step_*"))


def _check_same_run(folder: Path, saved: dict[str, Any], state: TrainState) -> None:
    for field, key in (("seed", "run.seed"), ("data_fingerprint", "data.folder")):
        if saved[field] != getattr(state, field):
            raise CheckpointError(
                f"checkpoint {folder} was trained with another {key} ({field} {saved[field]!r}, now "
                f"{getattr(state, field)!r}): restore {key}, or start anew with another run.folder."
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {folder} has format {manifest['format']}; this farspan reads {FORMAT}.")
        return manifest["train_state"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"checkpoint {folder} has no readable {MANIFEST}: delete the folder to resume from the one before."
        ) from None


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
