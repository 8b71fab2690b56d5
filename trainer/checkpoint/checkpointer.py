"""Saving and loading of a run: parameters, optimizer state and TrainState of all ranks, one folder for each step.

    checkpoints/step_00000100/   __0_0.distcp __1_0.distcp .metadata   parameters and optimizer state
                                 manifest.json                         identity, TrainState, hashes of the files
A save copies the state, then writes it from a thread on each rank; the threads have their own process group. They write
to a hidden folder, renamed when it is complete and durable: a folder with its final name is finished.
Rank 0 decides and broadcasts, as other ranks may see an older state of a shared file system.

Order of a commit, so that a crash at any point leaves either the old or the new checkpoint:
    all ranks   write and fsync their shards, hash them on the way     a crash leaves .step_…partial, deleted later
    rank 0      compare sizes, write and fsync manifest.json           sizes and hashes of all shards
    rank 0      fsync the folder, rename it, fsync its parent          now it is finished
    rank 0      delete old checkpoints                                 each renamed first, for the same reason
"""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from farspan.errors import CheckpointError
from farspan.parallel.mesh import group_along
from farspan.trainer.checkpoint.identity import begins_data_anew, is_recut
from farspan.trainer.checkpoint.manifest import START_AGAIN, Manifest, damaged
from farspan.trainer.checkpoint.shards import MisfitError, check_same_tensors, read_shards, write_shards
from farspan.trainer.checkpoint.steps import finished, make_room, prune, publish, step_name
from farspan.trainer.checkpoint.verify import check_sizes, newest, verified
from farspan.trainer.config import CheckpointConfig
from farspan.trainer.engines.engine import Engine
from farspan.trainer.renamed import current_names
from farspan.trainer.resilience.agreement import all_gather_objects, on_first_rank, raise_on_all_ranks
from farspan.trainer.state import TrainState
from farspan.units import BYTES, readable

SPARE_BYTES = 1 << 20
"""Disk space for the index and the manifest."""
LAST_MOMENT_S = 2.0
"""How long a rank that is about to exit waits for its save."""

log = logging.getLogger("farspan")


class Checkpointer:
    """Saves and loads the model and the optimizer of an engine in `folder`; every rank makes the same calls.

    identity: settings by dotted name, as JSON values, that a run must share with the checkpoint it resumes from.
    defaults: the values, by the same names, that a checkpoint from before such a setting existed was trained with.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        identity: Mapping[str, Any],
        defaults: Mapping[str, Any],
        config: CheckpointConfig,
    ) -> None:
        self._folder = folder
        self._engine = engine
        # As JSON reads them back: tuples become lists.
        self._identity, self._defaults = json.loads(json.dumps((dict(identity), dict(defaults))))
        self._config = config
        self._group = group_along("checkpoint", {"ranks": dist.get_world_size()}, "ranks", backend="gloo")
        self._copies = BlockingAsyncStager(cache_staged_state_dict=True)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of `state.step`, delete old ones, and return its folder.

        Raises CheckpointError when it cannot be written; finished checkpoints are untouched then.
        """
        self.start_saving(state)
        self.finish_saving()
        return self._folder / step_name(state.step)

    def start_saving(self, state: TrainState) -> None:
        """Copy the state and save it in the background, after the save in progress, if any.

        Raises CheckpointError as `finish_saving` does for the earlier save, or when there is no room for this one.
        """
        self.finish_saving()
        tensors = self._engine.state()
        manifest = Manifest(identity=self._identity, train_state=state.state_dict(), files={})
        num_bytes = _num_bytes(tensors)
        partial = on_first_rank(lambda: self._writable(state.step, lambda: self._make_room(state.step, num_bytes)))
        copies = self._copy(tensors)

        def write() -> None:
            try:
                self._write(copies, partial, manifest)
            except BaseException as error:
                self._error = error

        # A daemon, so that the process can exit while this thread waits for ranks that have died.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the save in progress has failed, as far as this rank knows; others may learn it later."""
        return self._error is not None

    def finish_saving(self) -> None:
        """Wait for the save in progress, if any; raises CheckpointError, on all ranks, when it failed."""
        raise_on_all_ranks(self._join)

    def finish_saving_or_log(self) -> None:
        """Wait for the save in progress, if any, and only log its failure: the run ends for another reason."""
        try:
            self._join()
        except Exception as error:
            log.error("not saved   %s", error)

    def wait_briefly(self) -> None:
        """Wait a moment for the save in progress: this rank is about to exit, and others may have exited."""
        if self._thread is not None:
            self._thread.join(LAST_MOMENT_S)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def load_latest(self, state: TrainState) -> Path | None:
        """Load the newest complete checkpoint into model, optimizer and `state`; return its folder, None without any.

        Logs one line for each newer one that is damaged. Learning rate, weight decay and the like stay those of the
        optimizer; where the data or their order have changed, `state` points to the first sequence. Raises
        CheckpointError when all are damaged, or one is of another run.
        """
        found = on_first_rank(lambda: finished(self._folder))
        if not found:
            return None
        folder, manifest = newest(found, self._load, f", or {START_AGAIN}")
        state.load_state_dict(dict(manifest.train_state))
        if anew := begins_data_anew(self._changes(manifest)):
            log.info(
                "data        from the first sequence on, with another %s; %d sequences of the earlier order were read",
                " and ".join(anew),
                state.sequences,
            )
            state.sequences = 0
        return folder

    def _load(self, folder: Path) -> Manifest:
        """Fill model and optimizer; raises DamagedError, on all ranks, where a file is not as it was written."""
        tensors = self._engine.state()
        manifest = on_first_rank(lambda: self._read_own_manifest(folder, tensors))
        with verified(folder, manifest.files):
            self.read(folder)
        return manifest

    def read(self, folder: Path) -> None:
        """Fill model and optimizer from the files of a checkpoint, without comparing hashes.

        Raises, on all ranks, CheckpointError where model or optimizer have other tensors, and DamagedError where one
        cannot read its part; model and optimizer may be half filled then.
        """
        tensors = self._engine.state()
        try:
            read_shards(tensors, folder, has_others=False)
        except MisfitError as error:
            raise CheckpointError(
                f"checkpoint {folder} does not fit this model and optimizer ({error}): go back to the configuration "
                f"that it was trained with, or {START_AGAIN}."
            ) from None
        except CheckpointError as error:
            raise damaged(folder, str(error)) from None
        self._engine.load_state(**tensors)

    def _copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Copy tensors to the CPU, into the memory of the last copy: fresh memory costs more than the copy."""
        if self._copies.state_dict_cache is None and not torch.cuda.is_available():
            # By default the stager pins its memory, which needs a GPU.
            self._copies.state_dict_cache = BlockingAsyncStager().stage(tensors)
        return self._copies.stage(tensors)

    def _read_own_manifest(self, folder: Path, tensors: Mapping[str, Any]) -> Manifest:
        """Read a manifest; raises CheckpointError where the checkpoint is of another run.

        tensors: of this run, to offer no change that they do not fit.
        """
        manifest = Manifest.read(folder)
        check_sizes(folder, manifest.files)
        changes = self._changes(manifest)
        if is_recut(changes) or not changes.keys() <= set(self._config.accept_changed):
            raise self._refusal(folder, changes, tensors)
        return manifest

    def _refusal(self, folder: Path, changes: Mapping[str, str], tensors: Mapping[str, Any]) -> CheckpointError:
        """Return the error for a checkpoint of other settings, with what can be done: only what will work."""
        was = f"checkpoint {folder} was trained with another {', another '.join(changes.values())}"
        back = f"go back to that, or {START_AGAIN}"
        try:
            check_same_tensors(tensors, folder)
        except MisfitError as error:
            return CheckpointError(f"{was}, and does not fit this model and optimizer ({error}): {back}.")
        except CheckpointError as error:
            return damaged(folder, str(error))
        if is_recut(changes):
            return CheckpointError(
                f"{was}, and what is left of the epoch cannot be cut anew: {back} and run.start_from={folder}, or "
                f"begin the data anew with another run.seed and {_accepting([*changes, 'run.seed'])}."
            )
        if not changes.keys() <= self._identity.keys():
            # Of another version, which had more settings.
            return CheckpointError(f"{was}: {back}.")
        anew = ", which begins the data anew" if begins_data_anew(changes) else ""
        return CheckpointError(f"{was}: {back}, or accept it with {_accepting(changes)}{anew}.")

    def _changes(self, manifest: Manifest) -> dict[str, str]:
        """Return in words what this run does not share with the one of a manifest, by name."""
        saved = {**self._defaults, **current_names(manifest.identity)}
        return {
            name: f"{name} ({saved.get(name)!r}, now {self._identity.get(name)!r})"
            for name in sorted({*saved, *self._identity})
            if saved.get(name) != self._identity.get(name)
        }

    def _make_room(self, step: int, num_bytes: int) -> Path:
        partial = make_room(self._folder, step)
        free = shutil.disk_usage(self._folder).free
        if num_bytes + SPARE_BYTES > free:
            partial.rmdir()
            raise CheckpointError(
                f"checkpoint {self._folder / step_name(step)} takes {readable(num_bytes, BYTES)}, should leave "
                f"{readable(SPARE_BYTES, BYTES)}, and {readable(free, BYTES)} are free: make room, and the same "
                "command goes on from the last checkpoint; or keep fewer with "
                f"checkpoint.keep={self._config.keep}."
            )
        return partial

    def _write(self, tensors: Mapping[str, Any], partial: Path, manifest: Manifest) -> None:
        """Write this rank's shards; then rank 0 commits the checkpoint."""
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
                prune(self._folder, keep=self._config.keep, permanent_every_steps=self._config.permanent_every_steps)
            except OSError as error:
                # The new checkpoint is saved: the run can go on while there is room.
                log.warning("not pruned  %s", error)

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


def _accepting(names: Iterable[str]) -> str:
    """Return the setting that accepts changes, in quotes, to be pasted into a shell."""
    return "'checkpoint.accept_changed=[{}]'".format(",".join(f'"{name}"' for name in sorted(names)))


def _num_bytes(tensors: Mapping[str, Any]) -> int:
    """Return the bytes of full tensors, each counted once however many ranks have a part of it."""
    return sum(
        _num_bytes(part) if isinstance(part, Mapping) else part.numel() * part.element_size()
        for part in tensors.values()
    )
