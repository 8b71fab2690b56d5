"""Whether a checkpoint holds what was written: its sizes, its every byte, and which is the newest that does."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint.manifest import DamagedError, FileRecord, Manifest, damaged
from farspan.trainer.checkpoint.steps import finished
from farspan.trainer.resilience.agreement import raise_on_all_ranks

HASHING_THREADS = 4
"""Of one process; hashing lets other threads run."""

log = logging.getLogger("farspan")


def check_whole(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; raises DamagedError unless every file holds what was written."""
    manifest = Manifest.read(folder)
    check_sizes(folder, manifest.files)
    check_content(folder, manifest.files)
    return manifest


def newest_whole(folder: Path) -> Path:
    """Return the newest checkpoint in `folder` that is whole; say in one line why each newer one is not.

    Raises CheckpointError if there is none.
    """
    found = finished(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no finished checkpoint: name the folder of a run that has saved one.")
    for path in reversed(found):
        try:
            check_whole(path)
        except DamagedError as error:
            log.info("refused     %s", error)
        else:
            return path
    raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole: restore one of them.")


@contextmanager
def verified(folder: Path, files: Mapping[str, FileRecord]) -> Iterator[None]:
    """Read `files` beside what the block does, each rank a part of them; every rank makes the same call.

    Raises DamagedError, on all ranks, where one holds other bytes than were written, whatever the block raises.
    """
    share = deal(files, dist.get_world_size())[dist.get_rank()]
    with ThreadPoolExecutor(1) as beside:
        result = beside.submit(check_content, folder, share)
        try:
            yield
        finally:
            # What is wrong with a file says more than what came of reading it.
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
    """Read `files` whole, several at a time; raise DamagedError where one holds other bytes than were written."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        for wrong in threads.map(lambda item: _difference(folder / item[0], item[1]), files.items()):
            if wrong is not None:
                raise damaged(folder, wrong)


def deal(files: Mapping[str, FileRecord], among: int) -> list[dict[str, FileRecord]]:
    """Deal files among so many readers, the largest first, each to the reader that has least."""
    shares: list[dict[str, FileRecord]] = [{} for _ in range(among)]
    loads = [0] * among
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
