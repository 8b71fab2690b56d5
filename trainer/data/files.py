"""Input files as bytes: gzip and zstd are decompressed, and what holds no text is refused by its first bytes."""

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from farspan.errors import DataError

# By suffix or, whatever the name, by first bytes.
COMPRESSIONS = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}
HEAD_BYTES = 512
NOT_TEXT = {
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\0",
    "lz4": rb"\x04\x22\x4d\x18",
    "compress": rb"\x1f\x9d",
    "zip": rb"PK\x03\x04",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "tar": rb"(?s:.{257})ustar",
    "Arrow": rb"ARROW1",
    "PDF": rb"%PDF-",
    # What is left after decompression.
    "gzip": rb"\x1f\x8b\x08",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "parquet": rb"PAR1",
}
Content = BufferedReader | gzip.GzipFile
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class UnreadableError(Exception):
    """A document that is empty or not UTF-8, or no file at all: skipped when asked, else refused with this message."""


def names_of(path: Path) -> list[str]:
    """Return the name in lower case and, for a compressed file, that without the compression's suffix."""
    name = path.name.lower()
    return [name, *(name.removesuffix(suffix) for suffix in COMPRESSIONS if name.endswith(suffix))]


def label_of(path: Path) -> str:
    """Return the suffix of a file, with that of its compression."""
    whole, bare = names_of(path)[0], names_of(path)[-1]
    return Path(bare).suffix + whole[len(bare) :] or "without suffix"


@contextmanager
def opened(path: Path) -> Iterator[Content]:
    """Yield the content of a file, decompressed.

    Raises DataError for a corrupt file and for what holds no text, UnreadableError for UTF-16, OSError. Parquet passes,
    since it is read by its path.
    """
    with path.open("rb") as file:
        head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
        compression = next(
            (
                suffix
                for suffix, magic in COMPRESSIONS.items()
                if head.startswith(magic) or (head and path.name.lower().endswith(suffix))
            ),
            None,
        )
        if compression is None:
            if not (head.startswith(b"PAR1") and names_of(path)[-1].endswith(".parquet")):
                _refuse_no_text(path, head)
            yield file
            return
        try:
            with _decompressed(file, compression, path) as content:
                _refuse_no_text(path, content.peek(HEAD_BYTES)[:HEAD_BYTES])
                yield content
        except (EOFError, zlib.error, OSError) as error:
            # A number says that it is the system that fails.
            if isinstance(error, OSError) and error.errno:
                raise
            raise DataError(
                f"{path} is a truncated or corrupt {compression} file ({error}); fetch it again."
            ) from error


def _decompressed(file: BufferedReader, compression: str, path: Path) -> Content:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    raw = imported_pyarrow(path).CompressedInputStream(file, "zstd")
    return BufferedReader(raw)


def imported_pyarrow(path: Path) -> Any:
    """Return the package; raises DataError where it is absent."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(f"Reading {path} needs the package pyarrow; `pip install -e '.[data]'`.") from error
    return pyarrow


def _refuse_no_text(path: Path, head: bytes) -> None:
    kind = next((kind for kind, pattern in NOT_TEXT.items() if re.match(pattern, head)), None)
    if kind is not None:
        raise DataError(f"{path} holds {kind} data, not text; unpack or convert it, rename it or --exclude it.")
    # UTF-16 without a mark: every other byte of western text is 0.
    if head.startswith(UTF16_MARKS) or head.count(0) * 3 > len(head):
        raise UnreadableError(
            f"{path} is UTF-16 text or no text at all; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8), or --exclude it."
        )
