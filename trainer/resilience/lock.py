"""One run per folder: a lock that the system releases when the process ends, however it ends.

Some file systems have no locks between nodes. So the owner also writes its name into the file and touches it again and
again; a process that gets the lock although the file names one on another host first watches for such a touch.
"""

import fcntl
import logging
import os
import re
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from farspan.errors import ConfigError

LOCK_FILE = "lock"
BEAT_S = 2.0
WATCH_S = 5.0
"""Longer than the time between two touches, on a busy machine too."""
PATIENCE_S = 60.0
"""How long a restarted job waits for the last process of its previous start to end."""

HOW_TO_WRITE = "make room, change its permissions, or choose another run.folder"

RECORD = re.compile(r"process \d+ on (?P<host>[^,]+)(, job (?P<job>.+))?")

log = logging.getLogger("farspan")


def lock_folder(folder: Path, job: str | None = None) -> ExitStack:
    """Make `folder` and lock it until the result is closed; raises ConfigError when another run has it.

    job: the scheduler's name of this run; waits for the same job's previous start to end.
    """
    with ExitStack() as lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = lock.enter_context((folder / LOCK_FILE).open("a+"))
            _wait_for_lock(file, folder, job)
            os.ftruncate(file.fileno(), 0)
            record = f"process {os.getpid()} on {socket.gethostname()}" + (f", job {job}\n" if job else "\n")
            os.write(file.fileno(), record.encode())
        except OSError as error:
            raise ConfigError(
                f"run.folder={str(folder)!r} cannot be written ({error.strerror or error}): {HOW_TO_WRITE}."
            ) from None
        lock.callback(file.truncate, 0)
        over = threading.Event()
        beats = threading.Thread(target=_beat, args=(file, over), name="lock", daemon=True)
        beats.start()
        lock.callback(beats.join)
        lock.callback(over.set)
        return lock.pop_all()


def _wait_for_lock(file: IO[str], folder: Path, job: str | None) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while (owner := _lock_or_owner(file, folder)) is not None:
        if job is None or _recorded("job", owner) != job or time.monotonic() > give_up_at:
            raise ConfigError(
                f"run.folder={str(folder)!r} is in use by {owner}: stop that run first, or choose another folder."
            )
        time.sleep(BEAT_S / 10)


def _beat(file: IO[str], over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        try:
            os.utime(file.fileno())
        except OSError as error:
            # A file server may be away for a while: the next touch may work.
            log.debug("lock not touched: %s", error)


def _lock_or_owner(file: IO[str], folder: Path) -> str | None:
    """Lock the file and return None, or return the process that has it."""
    has_locks = is_locked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_locked = False
    except OSError as error:
        has_locks = False
        log.warning("not locked  %s: its file system has no locks (%s)", folder, error.strerror)
    file.seek(0)
    owner = file.read().strip()
    if not is_locked:
        return owner or "another process"
    # On the same host the lock itself shows whether that process is running.
    if not owner or (has_locks and _recorded("host", owner) == socket.gethostname()):
        return None
    return owner if _is_touched(Path(file.name)) else None


def _recorded(part: str, owner: str) -> str | None:
    match = RECORD.fullmatch(owner)
    return match[part] if match else None


def _is_touched(path: Path) -> bool:
    """Return whether another process still touches the file."""
    first = _touched_at(path)
    give_up_at = time.monotonic() + WATCH_S
    while time.monotonic() < give_up_at:
        time.sleep(WATCH_S / 50)
        if _touched_at(path) != first:
            return True
    return False


def _touched_at(path: Path) -> int:
    # Opened anew each time: only then does a network file system ask its server.
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns
