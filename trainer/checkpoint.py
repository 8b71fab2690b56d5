"""Checkpoints: every rank's shards through torch DCP, and a manifest that is written last.

    checkpoints/step_00000100/   __0_0.distcp __1_0.distcp .metadata   parameters and optimizer state
                                 manifest.json                         format, identity, TrainState, sizes of the files
A checkpoint is written under a hidden name and renamed when it is whole: a folder with its final name is complete.
Rank 0 decides and tells the others, whose view of a shared file system may be older.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from farspan.kernels.errors import CheckpointError
from farspan.trainer.agreement import on_first_rank
from farspan.trainer.state import TrainState

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "step_"
START_ANEW = "start anew with another run.folder"
Identity = Mapping[str, Any]


class Checkpointer:
    """Saves and loads one model and its optimizer in `folder`; every rank makes the same calls.

    identity: settings by dotted name, as JSON values, that a resumed run must share with the checkpoint.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, identity: Identity, keep: int
    ) -> None:
        self._folder = folder
        self._model, self._optimizer = model, optimizer
        # As it will be read back: tuples become lists.
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._keep = keep

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of `state.step` and drop the oldest beyond `keep`; return its folder.

        Raises CheckpointError when it cannot be written; finished checkpoints are untouched then.
        """
        final = self._folder / f"{PREFIX}{state.step:08d}"
        partial = self._folder / f".{final.name}.partial"
        on_first_rank(lambda: _writing(final, lambda: self._make_room(partial)))
        try:
            save_shards(self._tensors(), checkpoint_id=partial)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {final} cannot be written ({causes(error)}): make room.") from None
        on_first_rank(lambda: _writing(final, lambda: self._commit(partial, final, state)))
        return final

    def load_latest(self, state: TrainState) -> Path | None:
        """Load the newest checkpoint into model, optimizer and `state`; return its folder, None if there is none.

        Learning rate, decay and the like stay those of the optimizer. Raises CheckpointError when the checkpoint
        cannot be read, or is of another model, seed or data; model and optimizer may be half loaded then.
        """
        newest, saved = on_first_rank(self._newest)
        if newest is None:
            return None
        tensors = self._tensors()
        settings = [_without_parameters(group) for group in self._optimizer.param_groups]
        try:
            load_shards(tensors, checkpoint_id=newest)
        except CheckpointException as error:
            raise CheckpointError(_damaged(newest, causes(error))) from None
        set_state_dict(
            self._model, self._optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
        )
        for group, setting in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(setting)
        state.load_state_dict(saved)
        return newest

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        """Return the folder and the TrainState of the checkpoint to load, once it is known to fit and be whole."""
        finished = _finished(self._folder)
        if not finished:
            return None, {}
        manifest = _read_manifest(finished[-1])
        self._check_identity(finished[-1], manifest["identity"])
        _check_files(finished[-1], manifest["files"])
        return finished[-1], manifest["train_state"]

    def _check_identity(self, folder: Path, saved: Identity) -> None:
        for name in sorted({*saved, *self._identity}):
            then, now = saved.get(name), self._identity.get(name)
            if then != now:
                raise CheckpointError(
                    f"checkpoint {folder} was trained with another {name} ({then!r}, now {now!r}): restore it, or "
                    f"{START_ANEW}."
                )

    def _make_room(self, partial: Path) -> None:
        # What a run that died in the middle of a save has left behind.
        for abandoned in self._folder.glob(f".{PREFIX}*"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)

    def _commit(self, partial: Path, final: Path, state: TrainState) -> None:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, "identity": self._identity, "train_state": state.state_dict(), "files": files}
        _write_durably(partial / MANIFEST, manifest)
        _sync(partial)
        if final.exists():
            # Of an earlier attempt; out of sight until the new one is in place.
            final.rename(partial.with_suffix(".replaced"))
        partial.rename(final)
        _sync(self._folder)
        shutil.rmtree(partial.with_suffix(".replaced"), ignore_errors=True)
        for old in _finished(self._folder)[: -self._keep]:
            shutil.rmtree(old)


def newest_whole(folder: Path) -> Path:
    """Return the newest checkpoint in `folder`; raises CheckpointError if there is none, or it is not whole."""
    finished = _finished(folder)
    if not finished:
        raise CheckpointError(f"{folder} holds no finished checkpoint: name the folder of a run that has saved one.")
    check_whole(finished[-1])
    return finished[-1]


def check_whole(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is a checkpoint none of whose files is missing or cut."""
    _check_files(folder, _read_manifest(folder)["files"])


def _finished(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, parts = manifest["format"], [manifest[part] for part in ("identity", "train_state", "files")]
        TrainState().load_state_dict(manifest["train_state"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(_damaged(folder, f"{MANIFEST} is missing or unreadable")) from None
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {version!r} but this farspan reads {FORMAT}: use the farspan that wrote "
            f"it, or {START_ANEW}."
        )
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(_damaged(folder, f"{MANIFEST} has parts of the wrong kind"))
    return manifest


def _check_files(folder: Path, files: Mapping[str, int]) -> None:
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(_damaged(folder, f"{name} is missing"))
        if path.stat().st_size != size:
            raise CheckpointError(_damaged(folder, f"{name} has {path.stat().st_size} bytes, not {size}"))


def _damaged(folder: Path, cause: str) -> str:
    return (
        f"checkpoint {folder} is damaged ({cause}): delete or restore that folder, and the same command resumes from "
        f"the newest one left; or {START_ANEW}."
    )


def causes(error: CheckpointException) -> str:
    """Return what went wrong on any rank, each cause once."""
    return "; ".join(sorted({" ".join(str(failure[0]).split()) for failure in error.failures.values()}))


def _writing(folder: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder} cannot be written ({error.strerror or error}): make room, or choose another "
            "run.folder."
        ) from None


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _write_durably(path: Path, content: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make what was created or renamed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder, and need not.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
