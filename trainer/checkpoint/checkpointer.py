"""Saving and loading of a run: parameters, optimizer state and TrainState of all ranks, as one folder for each step.

    checkpoints/step_00000100/   __0_0.distcp __1_0.distcp .metadata   parameters and optimizer state
                                 manifest.json                         identity, TrainState, hashes of the files
A save copies what it saves and goes on in a thread of each rank, which talk over a process group of their own. It is
written under a hidden name and renamed when it is whole and durable: a folder with its final name is finished.
Rank 0 decides and tells the others, whose view of a shared file system may be older.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from farspan.errors import CheckpointError
from farspan.parallel.mesh import group_along
from farspan.trainer.checkpoint.background import Background
from farspan.trainer.checkpoint.manifest import START_ANEW, DamagedError, Manifest, damaged
from farspan.trainer.checkpoint.shards import read_shards, write_shards
from farspan.trainer.checkpoint.steps import finished, make_room, prune, publish, step_name
from farspan.trainer.checkpoint.verify import check_sizes, verified
from farspan.trainer.config import CheckpointConfig
from farspan.trainer.resilience.agreement import all_gather_objects, on_first_rank, raise_on_all_ranks
from farspan.trainer.state import TrainState

SPARE_BYTES = 1 << 20
"""Of room on the disk, for the index and the manifest."""

log = logging.getLogger("farspan")


class Checkpointer:
    """Saves and loads one model and its optimizer in `folder`; every rank makes the same calls.

    identity: settings by dotted name, as JSON values, that a resumed run must share with the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        identity: Mapping[str, Any],
        config: CheckpointConfig,
    ) -> None:
        self._folder = folder
        self._model, self._optimizer = model, optimizer
        # As it will be read back: tuples become lists.
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._config = config
        self._group = group_along("checkpoint", {"ranks": dist.get_world_size()}, "ranks", backend="gloo")
        self._copies = BlockingAsyncStager(cache_staged_state_dict=True)
        self._writing = Background("checkpoint")

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of `state.step` and drop old ones, then return its folder.

        Raises CheckpointError when it cannot be written; finished checkpoints are untouched then.
        """
        self.start_saving(state)
        self.finish_saving()
        return self._folder / step_name(state.step)

    def start_saving(self, state: TrainState) -> None:
        """Copy everything and go on saving in the background; wait first for a save that is under way.

        Raises CheckpointError as `finish_saving` does for that one, or when there is no room for this one.
        """
        self.finish_saving()
        tensors = _saved(*get_state_dict(self._model, self._optimizer))
        manifest = Manifest(identity=self._identity, train_state=state.state_dict(), files={})
        num_bytes = _num_bytes(tensors)
        partial = on_first_rank(lambda: self._writable(state.step, lambda: self._make_room(state.step, num_bytes)))
        copies = self._copy(tensors)
        self._writing.start(lambda: self._write(copies, partial, manifest))

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the save under way has failed; the others may come to know it later."""
        return self._writing.has_failed

    def finish_saving(self) -> None:
        """Wait for the save under way, if any; raises CheckpointError, on all ranks, when it failed."""
        raise_on_all_ranks(self._writing.finish)

    def settle_saving(self) -> None:
        """Wait for the save under way, if any, and only say so when it failed: the run ends of something else."""
        try:
            self._writing.finish()
        except Exception as error:
            log.error("not saved   %s", error)

    def abandon_saving(self) -> None:
        """Wait no longer than a moment for the save under way: this rank is about to end, and others may have."""
        self._writing.abandon()

    def load_latest(self, state: TrainState) -> Path | None:
        """Load the newest checkpoint that is whole into model, optimizer and `state`; return its folder.

        None if there is no checkpoint. Each newer one that is damaged is said in one line. Learning rate, decay and the
        like stay those of the optimizer. Raises CheckpointError when all are damaged, or one is of another run.
        """
        found = on_first_rank(lambda: finished(self._folder))
        for folder in reversed(found):
            try:
                manifest = self._load(folder)
            except DamagedError as error:
                log.info("refused     %s", error)
                continue
            state.load_state_dict(dict(manifest.train_state))
            return folder
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self._folder} can be used, see the lines before: restore "
                f"one of them, or {START_ANEW}."
            )
        return None

    def _load(self, folder: Path) -> Manifest:
        """Fill model and optimizer; raises DamagedError, on all ranks, where a file is not as it was written."""
        manifest = on_first_rank(lambda: self._read_manifest(folder))
        with verified(folder, manifest.files):
            self.read(folder)
        return manifest

    def read(self, folder: Path) -> None:
        """Fill model and optimizer with what the files of a checkpoint hold, whether or not that is what was written.

        Raises DamagedError, on all ranks, where one cannot be read; model and optimizer may be half filled then.
        """
        model, optimizer = get_state_dict(self._model, self._optimizer)
        try:
            read_shards(_saved(model, optimizer), folder)
        except CheckpointError as error:
            raise damaged(folder, str(error)) from None
        set_state_dict(self._model, self._optimizer, model_state_dict=model, optim_state_dict=optimizer)

    def _copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copy tensors to the CPU, into the memory of the last copy: fresh memory costs more than the copying."""
        if self._copies.state_dict_cache is None and not torch.cuda.is_available():
            # The stager's own would be pinned, which is for GPUs.
            self._copies.state_dict_cache = BlockingAsyncStager().stage(tensors)
        return self._copies.stage(tensors)

    def _read_manifest(self, folder: Path) -> Manifest:
        manifest = Manifest.read(folder)
        check_sizes(folder, manifest.files)
        self._check_identity(folder, manifest.identity)
        return manifest

    def _check_identity(self, folder: Path, saved: Mapping[str, Any]) -> None:
        differences = {
            name: f"{name} ({saved.get(name)!r}, now {self._identity.get(name)!r})"
            for name in sorted({*saved, *self._identity})
            if saved.get(name) != self._identity.get(name) and name not in self._config.accept_changed
        }
        if differences:
            names = ", ".join(f'"{name}"' for name in differences)
            raise CheckpointError(
                f"checkpoint {folder} was trained with another {', another '.join(differences.values())}: go back to "
                f"that, or {START_ANEW}, or go on with what is new by checkpoint.accept_changed=[{names}]."
            )

    def _make_room(self, step: int, num_bytes: int) -> Path:
        partial = make_room(self._folder, step)
        free = shutil.disk_usage(self._folder).free
        if num_bytes + SPARE_BYTES > free:
            partial.rmdir()
            raise CheckpointError(
                f"checkpoint {self._folder / step_name(step)} takes {num_bytes / 1e9:,.3f} GB and {free / 1e9:,.3f} GB "
                "are free: make room, and the same command goes on from the last checkpoint; or keep fewer with "
                f"checkpoint.keep={self._config.keep}."
            )
        return partial

    def _write(self, tensors: Mapping[str, Any], partial: Path, manifest: Manifest) -> None:
        """Write this rank's part, then, on rank 0, what makes a checkpoint of all parts."""
        step = manifest.train_state["step"]
        try:
            written = write_shards(tensors, partial, self._group)
        except CheckpointError as error:
            on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True), self._group)
            raise self._not_writable(step, str(error)) from None
        files = {
            name: record for part in all_gather_objects(written, self._group) for name, record in sorted(part.items())
        }

        def commit() -> None:
            check_sizes(partial, files)
            Manifest(identity=manifest.identity, train_state=manifest.train_state, files=files).write(partial)
            final = publish(partial, step)
            log.info("saved       %s", final)
            try:
                prune(self._folder, keep=self._config.keep, permanent_every=self._config.permanent_every)
            except OSError as error:
                # This one is saved: the run can go on for as long as there is room.
                log.warning("not deleted %s", error)

        on_first_rank(lambda: self._writable(step, commit), self._group)

    def _writable(self, step: int, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as error:
            raise self._not_writable(step, error.strerror or str(error)) from None

    def _not_writable(self, step: int, cause: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._folder / step_name(step)} cannot be written ({cause}): make room, or choose another "
            "run.folder."
        )


def _saved(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds: settings of the optimizer are the configuration's."""
    return {"model": model, "optimizer": optimizer["state"]}


def _num_bytes(tensors: Mapping[str, Any]) -> int:
    """Return the bytes of whole tensors, each counted once however many ranks hold it."""
    return sum(
        _num_bytes(part) if isinstance(part, Mapping) else part.numel() * part.element_size()
        for part in tensors.values()
    )
