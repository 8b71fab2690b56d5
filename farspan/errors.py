"""Errors that a user can fix: each message is one sentence that says what to change."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_CHARACTERS = 60


def shortened(text: str) -> str:
    """Return a value as a message shows it."""
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


class FarspanError(Exception):
    """Base of every error that the command line prints as one sentence, without a traceback."""


class ConfigError(FarspanError):
    """A configuration value, or a combination of values, that cannot work."""


class DataError(FarspanError):
    """An input file or a prepared data folder that is missing, empty, truncated or corrupt."""


class CheckpointError(FarspanError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(FarspanError):
    """A run that cannot continue, such as one whose loss is no longer finite."""


USER_ERRNOS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
"""No right, no room, or a name that cannot be a file or a folder. A missing file is none: whoever opens one knows best
what it is for."""


@contextmanager
def file_errors_reported() -> Iterator[None]:
    """Raise ConfigError where a file or folder cannot be used for a reason that the user can change."""
    try:
        yield
    except OSError as error:
        if error.errno not in USER_ERRNOS or error.filename is None:
            raise
        raise ConfigError(
            f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): change its permissions, make room, or "
            "name another."
        ) from error
