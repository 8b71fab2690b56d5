"""Whether prepared data still is what it was: its files are older than the description that was written after them.

Where they are not, as after copying, every byte is hashed, which takes a second for each gigabyte or two.
"""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

from farspan.errors import DataError
from farspan.trainer.data.source import META_FILE, OFFSETS_FILE, TOKENS_FILE, TokenSource

CHUNK_TOKENS = 1 << 21

log = logging.getLogger("farspan")


def check_unchanged(folder: Path) -> None:
    """Raise DataError where a split's tokens or documents are not those that it was prepared with."""
    meta = folder / META_FILE
    written = meta.stat().st_mtime_ns
    if all((folder / name).stat().st_mtime_ns <= written for name in (TOKENS_FILE, OFFSETS_FILE)):
        return
    source = TokenSource(folder)
    log.info("%-12s%s: its files are newer than their description", "hashing", folder)
    found = _fingerprint(source)
    if found != source.fingerprint:
        raise DataError(
            f"{folder} was changed since it was prepared (fingerprint {source.fingerprint[:12]}..., now {found[:12]}"
            "...): restore it, or prepare it anew."
        )
    # So that the next start need not look again; where it cannot be written, it does.
    with suppress(OSError):
        os.utime(meta)


def _fingerprint(source: TokenSource) -> str:
    total = hashlib.sha256()
    for part in (source.tokens, source.offsets):
        for start in range(0, len(part), CHUNK_TOKENS):
            total.update(part[start : start + CHUNK_TOKENS].tobytes())
    return total.hexdigest()
