"""Verification of prepared data: unchanged if its files are not newer than the metadata, which is written last.

Where they are, as after copying, every byte is hashed: about a second for each gigabyte.
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


def check_integrity(folder: Path) -> None:
    """Raise DataError where the tokens or document offsets of a split have changed since it was prepared."""
    meta = folder / META_FILE
    written = meta.stat().st_mtime_ns
    if all((folder / name).stat().st_mtime_ns <= written for name in (TOKENS_FILE, OFFSETS_FILE)):
        return
    source = TokenSource(folder)
    log.info("%-12s%s, whose files are newer than its %s", "hashing", folder, META_FILE)
    now = _fingerprint(source)
    if now != source.fingerprint:
        raise DataError(
            f"{folder} was changed since it was prepared (fingerprint {source.fingerprint[:12]}..., now {now[:12]}"
            "...): restore it, or prepare it again."
        )
    # So that the next start need not hash again; in a read-only folder it does.
    with suppress(OSError):
        os.utime(meta)


def _fingerprint(source: TokenSource) -> str:
    total = hashlib.sha256()
    for part in (source.tokens, source.offsets):
        for start in range(0, len(part), CHUNK_TOKENS):
            total.update(part[start : start + CHUNK_TOKENS].tobytes())
    return total.hexdigest()
