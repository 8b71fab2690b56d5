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
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from farspan.errors import ConfigError

LOCK_FILE = "lock"
BEAT_S = 2.0
WATCH_S = 5.0
"""Longer than the time between two touches, on a busy machine too."""
PATIENCE_S = 60.0
"""How long a restarted job waits for the last process of its previous start to end."""

RECORD = re.compile(r"process \d+ on (?P<host>[^,]+)(, job (?P<job>.+))?")

log = logging.getLogger("farspan")


class FolderLock:
    """The lock on a folder, until it is closed."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beats.start()

    def close(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._beats.join()
            self._file.truncate(0)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                os.utime(self._file.fileno())
            except OSError as error:
                # A file server may be away for a while: the next touch may work.
                log.debug("lock not touched: %s", error)


def lock_folder(folder: Path, job: str | None = None) -> FolderLock:
    """Make `folder` and lock it until the result is closed; raises ConfigError when another run has it.

    job: the scheduler's name of this run; waits for the same job's previous start to end.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise _not_writable(folder, error) from None
    host = socket.gethostname()
    give_up_at = time.monotonic() + PATIENCE_S
    while (owner := _lock_or_owner(file, folder, host)) is not None:
        if job is None or _job_of(owner) != job or time.monotonic() > give_up_at:
            file.close()
            raise ConfigError(
                f"run.folder={str(folder)!r} is in use by {owner}: stop that run first, or choose another folder."
            )
        time.sleep(BEAT_S / 10)
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), (f"process {os.getpid()} on {host}" + (f", job {job}\n" if job else "\n")).encode())
    except OSError as error:
        file.close()
        raise _not_writable(folder, error) from None
    return FolderLock(file)


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.folder={str(folder)!r} cannot be written ({error.strerror or error}): make room, or choose another."
    )


def _lock_or_owner(file: IO[str], folder: Path, host: str) -> str | None:
    """Lock the file and return None, or return the process that has it."""
    has_locks = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _recorded(file) or "another process"
    except OSError as error:
        has_locks = False
        log.warning("not locked  %s: its file system has no locks (%s)", folder, error.strerror)
    recorded = _recorded(file)
    # On the same host the lock itself shows whether that process is running.
    if not recorded or (has_locks and _host_of(recorded) == host):
        return None
    return recorded if _is_touched(Path(file.name)) else None


def _host_of(recorded: str) -> str | None:
    match = RECORD.fullmatch(recorded)
    return match["host"] if match else None


def _job_of(recorded: str) -> str | None:
    match = RECORD.fullmatch(recorded)
    return match["job"] if match else None


def _recorded(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


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
