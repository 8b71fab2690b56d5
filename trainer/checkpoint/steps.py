"""The checkpoints of a run in one folder: which are finished, how one becomes so, which are dropped.

    step_00000100/                a finished checkpoint
    .step_00000200.partial/       one that is being written, or was when its run died
    .step_00000100.dropped/       one that is being deleted
    refused_step_00000300/        one that a resumed run refused and has come past
Renaming is all that changes what a folder is, so that a run may die at any moment.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "step_"
REFUSED = "refused_"


def step_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a finished checkpoint."""
    return int(folder.name.removeprefix(PREFIX))


def finished(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def make_room(folder: Path, step: int) -> Path:
    """Make the folder to write a checkpoint into, and delete what dead runs have left behind; raises OSError."""
    partial = folder / f".{step_name(step)}.partial"
    for abandoned in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, step: int) -> Path:
    """Give a written checkpoint its name, durably; return its folder. Raises OSError.

    Newer ones, which the run did not resume from, are kept under another name: they are no part of its course.
    """
    folder = partial.parent
    sync(partial)
    for path in finished(folder):
        if step_of(path) >= step:
            aside = path.with_name(f"{REFUSED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    final = folder / step_name(step)
    partial.rename(final)
    sync(folder)
    return final


def prune(folder: Path, *, keep: int, permanent_every: int = 0) -> list[Path]:
    """Delete all finished checkpoints but the newest `keep` and those of every so many steps; return what they were.

    Raises OSError.
    """
    superfluous = list(_superfluous(folder, keep, permanent_every))
    for path in superfluous:
        # Half deleted it must not look finished.
        dropped = path.with_name(f".{path.name}.dropped")
        path.rename(dropped)
        # What is left of it, such as files that others hold open, goes with the next save.
        shutil.rmtree(dropped, ignore_errors=True)
    return superfluous


def _superfluous(folder: Path, keep: int, permanent_every: int) -> Iterator[Path]:
    for path in finished(folder)[:-keep]:
        if not (permanent_every and step_of(path) % permanent_every == 0):
            yield path


def sync(folder: Path) -> None:
    """Make what was created or renamed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder, and need not.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
