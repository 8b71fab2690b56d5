"""Verification of checkpoints: sizes, every byte, and the newest complete one."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint.manifest import DamagedError, FileRecord, Manifest, damaged
from farspan.trainer.checkpoint.steps import finished
from farspan.trainer.resilience.agreement import raise_on_all_ranks

HASHING_THREADS = 4
"""Threads of one process; hashing releases the GIL."""

log = logging.getLogger("farspan")


def check_complete(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; raises DamagedError unless every file has the bytes that were written."""
    manifest = Manifest.read(folder)
    check_sizes(folder, manifest.files)
    check_content(folder, manifest.files)
    return manifest


def newest_complete(folder: Path) -> Path:
    """Return the newest complete checkpoint in `folder`; raises CheckpointError if there is none."""
    found = finished(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no finished checkpoint: name the folder of a run that has saved one.")
    return newest(found, check_complete)[0]


def newest(found: Sequence[Path], load: Callable[[Path], Manifest], otherwise: str = "") -> tuple[Path, Manifest]:
    """Return the newest of some checkpoints that `load` takes, and its manifest; log a line for each damaged one.

    Raises CheckpointError if all are damaged; otherwise: what to do but to restore one.
    """
    for path in reversed(found):
        try:
            return path, load(path)
        except DamagedError as error:
            log.info("skipped     %s", error)
    raise CheckpointError(
        f"none of the {len(found)} checkpoints in {found[0].parent} can be used, see the lines before: restore one of "
        f"them{otherwise}."
    )


@contextmanager
def verified(folder: Path, files: Mapping[str, FileRecord]) -> Iterator[None]:
    """Verify `files` while the block runs, each rank a share of them; every rank makes the same call.

    Raises DamagedError, on all ranks, where a file has other bytes than were written, whatever the block raises.
    """
    share = split_files(files, dist.get_world_size())[dist.get_rank()]
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(check_content, folder, share)
        try:
            yield
        finally:
            # A damaged file explains more than the error of the block that read it.
            raise_on_all_ranks(result.result)


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Raise DamagedError where a file is missing or has another size than was written."""
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise damaged(
                folder, f"{name} is missing" if isinstance(error, FileNotFoundError) else str(error)
            ) from None
        if size != record.bytes:
            raise damaged(folder, f"{name} has {size} bytes, not {record.bytes}")


def check_content(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Hash `files`, several at a time; raise DamagedError where one has other bytes than were written."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for wrong in threads.map(lambda item: _difference(folder / item[0], item[1]), files.items()):
            if wrong is not None:
                raise damaged(folder, wrong)


def split_files(files: Mapping[str, FileRecord], readers: int) -> list[dict[str, FileRecord]]:
    """Assign files to readers, the largest first, each to the reader with the fewest bytes."""
    shares: list[dict[str, FileRecord]] = [{} for _ in range(readers)]
    loads = [0] * readers
    for name, record in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        reader = loads.index(min(loads))
        shares[reader][name] = record
        loads[reader] += record.bytes
    return shares


def _difference(path: Path, record: FileRecord) -> str | None:
    try:
        with path.open("rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return None if found == record.sha256 else f"{path.name} holds other bytes than were written"
