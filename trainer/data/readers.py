"""Documents from text files, folders, JSONL and parquet; errors name the file that is empty, cut or corrupt."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from farspan.errors import DataError
from farspan.registry import nearest_name_hint

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
PARQUET_BATCH_ROWS = 64
SKIP_FLAG = "--skip-unreadable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document; `origin` is its file, with the line or row where a file holds several."""

    text: str
    origin: str


class _UnreadableError(Exception):
    """An empty document, or no file at all: skipped inside a folder when asked, else refused with this message."""


Unread = tuple[str, Callable[[], str]]
"""The origin of a document and what returns its text; raises UnicodeError or _UnreadableError."""


class DocumentReader:
    """Iterates the documents of files and folders in a fixed order, one in memory at a time."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        suffixes: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        text_key: str = "text",
        skip_unreadable: bool = False,
        omit: Path | None = None,
    ) -> None:
        """`suffixes`, `exclude` (names or globs) and the folder `omit` filter the files inside folders."""
        self._paths = [Path(path) for path in paths]
        self._suffixes = None if not suffixes else tuple(s if s.startswith(".") else f".{s}" for s in suffixes)
        self._exclude = tuple(exclude)
        self._text_key = text_key
        self._skip_unreadable = skip_unreadable
        self._omit = None if omit is None else omit.resolve()
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Document]:
        """Yield every document; raises DataError naming the file. Restarts `num_skipped`."""
        self.num_skipped = 0
        for path in self._paths:
            if path.is_dir():
                yield from self._read_folder(path)
            elif path.exists():
                yield from self._checked(_read_file(path, self._text_key), skip=False)
            else:
                raise DataError(f"The input path {path} does not exist; check its spelling.")

    def _read_folder(self, folder: Path) -> Iterator[Document]:
        num_files = 0
        for path in self._files(folder):
            num_files += 1
            # Opening a pipe found in a folder would wait for ever.
            not_a_file = partial(_refuse, f"{path} is a broken link or no regular file; remove it or --exclude it.")
            items = _read_file(path, self._text_key) if path.is_file() else iter([(str(path), not_a_file)])
            yield from self._checked(items, skip=self._skip_unreadable)
        if num_files == 0:
            wanted = f"file ending in {' or '.join(self._suffixes)}" if self._suffixes else "file"
            raise DataError(f"The folder {folder} holds no {wanted} to read; check the path, --suffix and --exclude.")

    def _files(self, folder: Path) -> Iterator[Path]:
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"The folder {folder} cannot be listed: {error.strerror}; fix or exclude it.") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if any(fnmatchcase(entry.name, pattern) for pattern in self._exclude):
                continue
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                # The result of an earlier run may lie inside the corpus folder.
                if self._omit is None or path.resolve() != self._omit:
                    yield from self._files(path)
            # Linked folders are not followed: they may lead back up, or repeat files.
            elif not entry.is_dir() and (self._suffixes is None or entry.name.endswith(self._suffixes)):
                yield path

    def _checked(self, items: Iterator[Unread], *, skip: bool) -> Iterator[Document]:
        for origin, read in items:
            try:
                text = read()
            except UnicodeError as error:
                problem = f"{origin} is not UTF-8 text ({error}); convert it, or pass its folder with {SKIP_FLAG}."
            except _UnreadableError as error:
                problem = str(error)
            else:
                yield Document(text=text, origin=origin)
                continue
            if not skip:
                raise DataError(problem)
            self.num_skipped += 1


def _read_file(path: Path, text_key: str) -> Iterator[Unread]:
    """Yield the documents of one file; raises DataError where the file is corrupt."""
    suffix = path.suffix.lower()
    is_empty = True
    try:
        if suffix in JSONL_SUFFIXES:
            items = _read_jsonl(path, text_key)
        elif suffix == PARQUET_SUFFIX:
            items = _read_parquet(path, text_key)
        else:
            items = _read_text(path)
        for item in items:
            is_empty = False
            yield item
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; fix or exclude it.") from error
    if is_empty:
        yield str(path), partial(_refuse, _empty(str(path)))


def _refuse(message: str) -> str:
    raise _UnreadableError(message)


def _empty(origin: str) -> str:
    return f"{origin} is empty; remove it, or pass its folder with {SKIP_FLAG}."


def _read_text(path: Path) -> Iterator[Unread]:
    data = path.read_bytes()  # not read_text, which converts newlines: byte counts have to be exact
    if data:
        yield str(path), data.decode


def _read_jsonl(path: Path, text_key: str) -> Iterator[Unread]:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.isspace():
                origin = f"{path}, line {number}"
                yield origin, partial(_line_text, data, text_key, origin)


def _line_text(data: bytes, text_key: str, origin: str) -> str:
    line = data.decode()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not JSON ({error}); fix the line (a cut file?).") from error
    if not isinstance(record, dict):
        raise DataError(f"{origin} is not a JSON object; each line must be an object with the key {text_key!r}.")
    if text_key not in record:
        hint = nearest_name_hint(text_key, [str(key) for key in record])
        raise DataError(f"{origin} has no key {text_key!r}; name the right one with --text-key.{hint}")
    return _value_text(record[text_key], text_key, origin)


def _value_text(value: object, text_key: str, origin: str) -> str:
    if value is None or value == "":
        raise _UnreadableError(_empty(f"{origin}: {text_key!r}"))
    if not isinstance(value, str):
        raise DataError(f"{origin}: {text_key!r} is not a string; name the right one with --text-key.")
    value.encode()  # raises UnicodeEncodeError: JSON can spell half a surrogate pair
    return value


def _read_parquet(path: Path, column: str) -> Iterator[Unread]:
    if path.stat().st_size == 0:
        return
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(f"Reading {path} needs the package pyarrow; `pip install -e '.[data]'`.") from error
    row = 0

    def text(scalar: Any, origin: str) -> str:
        return _value_text(scalar.as_py(), column, origin)

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                hint = nearest_name_hint(column, names)
                raise DataError(f"{path} has no column {column!r}; name the right one with --text-key.{hint}")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[column]):
                for scalar in batch.column(0):
                    row += 1
                    origin = f"{path}, row {row}"
                    yield origin, partial(text, scalar, origin)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is a truncated or corrupt parquet file ({error}); fetch it again.") from error
