"""Standard output and standard error: they may be closed, full, or without a reader, and the work of a command goes on.

Without a reader (`farspan … | head`) nothing is said; that a disk is full is said once.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from farspan.trainer.resilience.signals import EXIT_USER_ERROR

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger("farspan")


class _File(io.FileIO):
    """A standard stream that takes what it cannot write. lost: whether that was more than nobody reads."""

    lost = False

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            if not self.lost:
                self.lost = True
                name = {1: "output", 2: "error"}[self.fileno()]
                print_error(f"standard {name} cannot be written ({error.strerror}): make room; text is lost.")
        return memoryview(data).nbytes


def guard_standard_streams() -> None:
    """Let this process write to its standard streams whatever becomes of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Otherwise the next file that is opened takes the number, and gets the text. It is the lowest one free.
            assert os.open(os.devnull, os.O_RDWR) == number
            setattr(sys, name, stream := os.fdopen(number, "w" if number else "r", closefd=False))
        if number:
            file = _File(number, "w", closefd=False)
            # As python -u asks for.
            is_unbuffered = isinstance(stream.buffer, io.FileIO)
            guarded = io.TextIOWrapper(
                file if is_unbuffered else io.BufferedWriter(file),
                encoding=stream.encoding,
                # Names of files need not be text that the encoding has.
                errors="backslashreplace" if stream.errors == "strict" else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=is_unbuffered,
            )
            setattr(sys, name, guarded)


@contextmanager
def log_to(stream: TextIO) -> Iterator[None]:
    """Print log messages, without any prefix, to `stream`."""
    handler, level = logging.StreamHandler(stream), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def print_error(message: object) -> None:
    """Print a sentence for the user on standard error."""
    print(f"farspan: {message}", file=sys.stderr, flush=True)


def last_error(log: Path) -> str | None:
    """Return the last sentence for the user in a log, of a launcher, a rank or a SLURM job."""
    # In a job's log, each line of a rank begins with its number.
    found = re.findall(r"^(?:\d+: )?farspan: (.+)$", log.read_text(errors="replace"), re.MULTILINE)
    return found[-1] if found else None


def status_with_output(status: int) -> int:
    """Flush standard output at the end of a command; return its exit status, which is not 0 if text is lost."""
    sys.stdout.flush()
    file = sys.stdout.buffer
    raw = file.raw if isinstance(file, io.BufferedWriter) else file
    return status or (EXIT_USER_ERROR if getattr(raw, "lost", False) else 0)
