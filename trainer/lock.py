"""One run per folder: a lock that the system gives back when the process ends, however it ends."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from farspan.kernels.errors import ConfigError

LOCK_FILE = "lock"

log = logging.getLogger("farspan")


def lock_folder(folder: Path) -> IO[str]:
    """Make `folder` and lock it until the returned file is closed; raises ConfigError when another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"run.folder={str(folder)!r} cannot be written ({error.strerror or error}): choose another."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"run.folder={str(folder)!r} is in use by {holder}: stop that run first, or choose another folder."
        ) from None
    except OSError as error:
        log.warning("not locked  %s: its file system has no locks (%s)", folder, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
