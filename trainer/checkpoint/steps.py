"""The checkpoints of a run in one folder: which are finished, how to finish one, which to delete.

    step_00000100/                a finished checkpoint
    .step_00000200.partial/       one in progress, or left by a run that died
    .step_00000100.dropped/       one that is being deleted
    refused_step_00000300/        a damaged one that a resumed run skipped, and has trained past
Only renames change the kind of a folder, so that a run may die at any moment.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

PREFIX = "step_"
REFUSED = "refused_"


def step_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def finished(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def make_room(folder: Path, step: int) -> Path:
    """Make the folder to write a checkpoint into, and delete those that dead runs left; raises OSError."""
    partial = folder / f".{step_name(step)}.partial"
    for abandoned in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, step: int) -> Path:
    """Give a written checkpoint its final name, durably; return its folder. Raises OSError.

    Newer ones are renamed: the run skipped them as damaged when it resumed, so they are not of its trajectory.
    """
    folder = partial.parent
    sync(partial)
    for path in finished(folder):
        if step_of(path) >= step:
            refused = path.with_name(f"{REFUSED}{path.name}")
            shutil.rmtree(refused, ignore_errors=True)
            path.rename(refused)
    final = folder / step_name(step)
    partial.rename(final)
    sync(folder)
    return final


def prune(folder: Path, *, keep: int, permanent_every_steps: int = 0) -> list[Path]:
    """Delete all finished checkpoints but the newest `keep` and the permanent ones; return their paths.

    permanent_every_steps: those of its multiples stay; 0 for none. Raises OSError.
    """
    old = [p for p in finished(folder)[:-keep] if not permanent_every_steps or step_of(p) % permanent_every_steps]
    for path in old:
        # Half deleted, it must not look finished.
        dropped = path.with_name(f".{path.name}.dropped")
        path.rename(dropped)
        # The next save deletes the rest, such as files that other processes have open.
        shutil.rmtree(dropped, ignore_errors=True)
    return old


def sync(folder: Path) -> None:
    """Make creations and renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder, and need not.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
