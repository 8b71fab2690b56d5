"""What would survive a power cut, as far as a process asked for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def syncs_and_renames() -> Iterator[list[tuple[str, str]]]:
    """Record ("sync", name) and ("rename", new name) of files and folders, in their order."""
    events, fsync, rename = [], os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_rename(old: os.PathLike[str], new: os.PathLike[str]) -> None:
        events.append(("rename", Path(new).name))
        rename(old, new)

    with mock.patch.object(os, "fsync", note_sync), mock.patch.object(os, "rename", note_rename):
        yield events
