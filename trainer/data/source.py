"""One prepared split on disk: token ids, document offsets and metadata; its writer and its reader.

tokens.bin    uint16 or uint32, documents end to end, each closed by the end token
offsets.npy   int64 [documents + 1], where each document starts in tokens.bin
meta.json     SplitMeta, written last, so that it is newer than the other two
"""

import hashlib
import json
import logging
import os
from array import array
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from farspan.errors import DataError
from farspan.trainer.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.npy"
META_FILE = "meta.json"
SPLITS = ("train", "validation")
WRITE_BUFFER_BYTES = 1 << 20
CHUNK_TOKENS = 1 << 22
LONG_TOKENS = (4096, 32_768, 131_072)
"""Lengths that meta.json tells the share of."""
ADVICE = "prepare the folder again with `farspan data prepare`"

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMeta:
    """The content of `meta.json`; `fingerprint` is the SHA-256 of the token bytes, then the offset bytes."""

    format_version: int
    tokenizer: str
    vocabulary_size: int
    end_id: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    fingerprint: str
    # Absent in older folders.
    tokenizer_sha256: str | None = None
    """Of tokenizer.json; None for the byte tokenizer."""
    median_tokens: int | None = None
    longest_tokens: int | None = None
    """Tokens of documents, with their end tokens."""
    long_documents: dict | None = None
    """By length, the share of tokens in documents of at least so many tokens."""


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Return the little-endian dtype that holds every id: uint16 up to 65536 ids, else uint32."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


class SplitWriter:
    """Writes one split document by document; only the offsets stay in memory, 8 bytes a document."""

    def __init__(self, folder: Path, *, tokenizer: Tokenizer) -> None:
        """Make `folder` and open its token file; raises OSError."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocabulary_size)
        self._offsets = array("q", [0])
        self._num_tokens = self._num_bytes = 0
        self._hash = hashlib.sha256()
        self._file = (folder / TOKENS_FILE).open("wb", buffering=WRITE_BUFFER_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()

    @property
    def num_documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def is_open(self) -> bool:
        """Whether the current document has tokens."""
        return self._num_tokens > self._offsets[-1]

    def append(self, ids: np.ndarray) -> None:
        """Append `ids` [tokens] to the current document."""
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._num_tokens += len(ids)

    def end_document(self, num_bytes: int) -> None:
        """Append the end token to the current document, of `num_bytes` of UTF-8 text."""
        self.append(np.array([self._tokenizer.end_id]))
        self._offsets.append(self._num_tokens)
        self._num_bytes += num_bytes

    def add(self, ids: np.ndarray, *, num_bytes: int) -> None:
        """Append one document."""
        self.append(ids)
        self.end_document(num_bytes)

    def finish(self) -> SplitMeta:
        """Close the token file, write offsets and meta, and return the meta."""
        _sync_and_close(self._file)
        offsets = np.array(self._offsets, dtype="<i8")
        self._hash.update(offsets.tobytes())
        lengths = np.diff(offsets)
        meta = SplitMeta(
            format_version=FORMAT_VERSION,
            tokenizer=self._tokenizer.name,
            vocabulary_size=self._tokenizer.vocabulary_size,
            end_id=self._tokenizer.end_id,
            dtype=self._dtype.name,
            num_documents=self.num_documents,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            fingerprint=self._hash.hexdigest(),
            tokenizer_sha256=self._tokenizer.sha256,
            median_tokens=int(np.median(lengths)),
            longest_tokens=int(lengths.max()),
            long_documents={str(length): share_of_tokens(lengths, length) for length in LONG_TOKENS},
        )
        with (self._folder / OFFSETS_FILE).open("wb") as file:
            np.save(file, offsets)
            _sync_and_close(file)
        write_synced(self._folder / META_FILE, (json.dumps(asdict(meta), indent=2) + "\n").encode())
        return meta


class TokenSource:
    """One split folder, read-only; `tokens` is uint16 or uint32 [num_tokens], `offsets` int64 [num_documents + 1]."""

    def __init__(self, folder: str | Path) -> None:
        """Open and check the folder; raises DataError naming the file that is missing, cut or does not fit."""
        folder = Path(folder)
        meta = _read_meta(folder)
        self.folder = folder
        self.meta = meta
        self.vocabulary_size = meta.vocabulary_size
        self.end_id = meta.end_id
        self.num_documents = meta.num_documents
        self.num_tokens = meta.num_tokens
        self.num_bytes = meta.num_bytes
        self.fingerprint = meta.fingerprint
        self.offsets = _map_offsets(folder / OFFSETS_FILE, meta)
        self.tokens = _map_tokens(folder / TOKENS_FILE, meta)

    def document_lengths(self) -> np.ndarray:
        """Return the tokens of each document, its end token included, int64 [num_documents]."""
        return np.diff(self.offsets)

    def document(self, index: int) -> np.ndarray:
        """Return the ids of document `index` with its end token, a read-only view [tokens]; raises IndexError."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def share_of_tokens(lengths: np.ndarray, at_least: int) -> float:
    """Return the share of tokens in documents of at least so many, for the lengths of all documents [documents]."""
    return float(lengths[lengths >= at_least].sum() / lengths.sum())


def check_integrity(folder: Path) -> None:
    """Raise DataError where the tokens or document offsets of a split have changed since it was prepared.

    Unchanged if the files are not newer than the metadata, which is written last. Where they are, as after copying,
    every byte is hashed: about a second for each gigabyte.
    """
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


def _read_meta(folder: Path) -> SplitMeta:
    path = folder / META_FILE
    if not path.is_file():
        splits = [str(folder / split) for split in SPLITS if (folder / split / META_FILE).is_file()]
        fix = f"open {' or '.join(splits)}" if splits else "make it with `farspan data prepare`"
        raise DataError(f"{path} does not exist; {fix}.")
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}); {ADVICE}.") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} is of format version {version!r} but this farspan reads {FORMAT_VERSION}; {ADVICE}.")
    values: dict[str, Any] = {field.name: record.get(field.name) for field in fields(SplitMeta)}
    for field in fields(SplitMeta):
        value = values[field.name]
        if isinstance(value, bool) or not isinstance(value, field.type):  # pyright: ignore[reportArgumentType]
            raise DataError(f"{path} has {field.name}={values[field.name]!r}, not of the right type; {ADVICE}.")
    meta = SplitMeta(**values)
    if meta.dtype != token_dtype(meta.vocabulary_size).name or not 0 <= meta.end_id < meta.vocabulary_size:
        raise DataError(f"{path}: vocabulary_size={meta.vocabulary_size} does not fit dtype and end_id; {ADVICE}.")
    if not 1 <= meta.num_documents <= meta.num_tokens or meta.num_bytes < 1:
        raise DataError(f"{path} has impossible counts of documents, tokens or bytes; {ADVICE}.")
    return meta


def _map_tokens(path: Path, meta: SplitMeta) -> np.ndarray:
    dtype = token_dtype(meta.vocabulary_size)
    expected_bytes = meta.num_tokens * dtype.itemsize
    try:
        size_bytes = path.stat().st_size
        if size_bytes != expected_bytes:
            raise DataError(
                f"{path} has {size_bytes} bytes but {META_FILE} says {expected_bytes}, so it was cut or replaced; "
                f"{ADVICE} or copy it again."
            )
        tokens = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {ADVICE}.") from error
    if tokens[-1] != meta.end_id:
        raise DataError(f"{path} does not close its last document with end_id={meta.end_id}; {ADVICE}.")
    return tokens


def _map_offsets(path: Path, meta: SplitMeta) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"is cut or corrupt ({error})"
        raise DataError(f"{path} {reason}; {ADVICE} or copy it again.") from error
    if not isinstance(offsets, np.ndarray) or offsets.dtype != np.int64 or offsets.shape != (meta.num_documents + 1,):
        raise DataError(f"{path} is not int64 [{meta.num_documents + 1}] as {META_FILE} says; {ADVICE}.")
    offsets = np.asarray(offsets)
    if offsets[0] != 0 or offsets[-1] != meta.num_tokens:
        raise DataError(
            f"{path} runs from {offsets[0]} to {offsets[-1]}, not from 0 to num_tokens={meta.num_tokens}; {ADVICE}."
        )
    if not np.all(offsets[1:] > offsets[:-1]):
        raise DataError(f"{path} does not rise from document to document; {ADVICE}.")
    return offsets


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        _sync_and_close(file)


def _sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
