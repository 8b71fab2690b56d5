"""Documents from text, JSON and parquet files and folders of them; errors name the file that is empty or corrupt."""

import codecs
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from farspan.errors import DataError
from farspan.registry import nearest_name_hint
from farspan.trainer.data.files import Content, UnreadableError, imported_pyarrow, label_of, names_of, opened

JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIX = ".json"
PARQUET_SUFFIX = ".parquet"
PARQUET_BATCH_ROWS = 64
SKIP_FLAG = "--skip-unreadable"
CHUNK_BYTES = 1 << 20
SHOWN_KEYS = 20

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document; `origin` is its file, with the line or row where a file holds several."""

    text: bytes
    """UTF-8, without a byte order mark."""
    origin: str


Unread = tuple[str, Callable[[], bytes]]
"""The origin of a document and what returns its text; raises UnicodeError or UnreadableError."""


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
        self._suffixes = None if not suffixes else tuple(f".{suffix.removeprefix('.')}".lower() for suffix in suffixes)
        self._exclude = tuple(exclude)
        self._text_key = text_key
        self._skip_unreadable = skip_unreadable
        self._omit = None if omit is None else omit.resolve()
        self._restart()

    def _restart(self) -> None:
        self.num_skipped = 0
        self.first_skipped: str | None = None
        self.files: Counter[str] = Counter()
        """How many files were read, by suffix."""

    def __iter__(self) -> Iterator[Document]:
        """Yield every document; raises DataError naming the file. Restarts the counts."""
        self._restart()
        for path in self._paths:
            if path.is_dir():
                yield from self._read_folder(path)
            elif path.exists():
                yield from self._read_file(path)
            else:
                raise DataError(f"The input path {path} does not exist; check its spelling.")

    def _read_folder(self, folder: Path) -> Iterator[Document]:
        num_files = 0
        for path in self._files(folder):
            num_files += 1
            if path.is_file():
                yield from self._read_file(path)
            else:
                # Opening a pipe found in a folder would wait for ever.
                self._skip(f"{path} is a broken link or no regular file; remove it or --exclude it.")
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
            elif entry.is_dir():
                # It may lead back up, or repeat files.
                log.info("%-12s%s, a linked folder: name it as an input to read it", "left out", path)
            elif self._suffixes is None or any(name.endswith(self._suffixes) for name in names_of(path)):
                yield path

    def _read_file(self, path: Path) -> Iterator[Document]:
        num_documents = 0
        try:
            with opened(path) as file:
                self.files[label_of(path)] += 1
                for origin, read in _documents(file, path, self._text_key):
                    num_documents += 1
                    try:
                        document = Document(text=read(), origin=origin)
                    except UnicodeError as error:
                        self._skip(f"{origin} is not UTF-8 text ({error}); convert it, or pass {SKIP_FLAG}.")
                    except UnreadableError as error:
                        self._skip(str(error))
                    else:
                        yield document
        except UnreadableError as error:
            self._skip(str(error))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}; fix or exclude it.") from error
        else:
            if num_documents == 0:
                self._skip(_empty(str(path)))

    def _skip(self, problem: str) -> None:
        if not self._skip_unreadable:
            raise DataError(problem)
        self.num_skipped += 1
        self.first_skipped = self.first_skipped or problem


def _documents(file: Content, path: Path, text_key: str) -> Iterator[Unread]:
    """Return the documents of one file, by its suffix; raises DataError where it is corrupt."""
    if not file.peek(1):
        return iter(())
    suffix = Path(names_of(path)[-1]).suffix
    if suffix == PARQUET_SUFFIX:
        return _read_parquet(path, text_key)
    if suffix in JSONL_SUFFIXES:
        return _read_jsonl(enumerate(file, start=1), path, text_key)
    if suffix == JSON_SUFFIX:
        return _read_json(file, path, text_key)
    return _read_text(file, path)


def _empty(origin: str) -> str:
    return f"{origin} is empty; remove it, or pass {SKIP_FLAG}."


def _read_text(file: Content, path: Path) -> Iterator[Unread]:
    text = file.read().removeprefix(codecs.BOM_UTF8)
    if text:
        yield str(path), partial(_checked_text, text)


def _checked_text(text: bytes) -> bytes:
    # In chunks: as a str it could take four times as much memory.
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(text), CHUNK_BYTES):
        decoder.decode(text[start : start + CHUNK_BYTES])
    decoder.decode(b"", final=True)
    return text


def _read_jsonl(lines: Iterator[tuple[int, bytes]], path: Path, text_key: str) -> Iterator[Unread]:
    for number, line in lines:
        # A byte order mark begins each of several files in a row.
        line = line.removeprefix(codecs.BOM_UTF8)
        if line and not line.isspace():
            origin = f"{path}, line {number}"
            yield origin, partial(_line_text, line, text_key, origin)


def _line_text(data: bytes, text_key: str, origin: str) -> bytes:
    line = data.decode()
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not JSON ({error}); fix the line (a cut file?).") from error
    return _record_text(record, text_key, origin)


def _read_json(file: Content, path: Path, text_key: str) -> Iterator[Unread]:
    """Yield the documents of a .json file: an object a line, or one object, or one array of objects."""
    numbered = enumerate(file, start=1)
    lines = ((number, line) for number, line in numbered if line.removeprefix(codecs.BOM_UTF8).strip())
    number, line = next(lines, (0, b""))
    if not line or _is_object(line):
        yield from _read_jsonl(chain([(number, line)], lines), path, text_key)
        return
    data = line + file.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeError:
        yield str(path), partial(_checked_text, data)
        return
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is neither JSON lines nor one JSON value ({error}); fix it, or --exclude it."
        ) from error
    if isinstance(value, list):
        for element, record in enumerate(value, start=1):
            origin = f"{path}, element {element}"
            yield origin, partial(_record_text, record, text_key, origin)
    else:
        yield str(path), partial(_record_text, value, text_key, str(path))


def _is_object(line: bytes) -> bool:
    """Return whether a line is a JSON object, whatever its encoding."""
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8).decode(errors="replace")), dict)
    except (ValueError, RecursionError):
        return False


def _record_text(record: object, text_key: str, origin: str) -> bytes:
    if not isinstance(record, dict):
        raise DataError(f"{origin} is not a JSON object; each must be an object with the key {text_key!r}.")
    if text_key not in record:
        raise DataError(f"{origin} has no key {text_key!r}{_choices(text_key, [str(key) for key in record])}")
    return _value_text(record[text_key], text_key, origin)


def _choices(missing: str, names: list[str]) -> str:
    """Return the end of the sentence that `missing` is not there."""
    if not names:
        return ", nor any other; fix it, or --exclude the file."
    shown = ", ".join(map(repr, names[:SHOWN_KEYS]))
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return f", only {shown}{more}; name the right one with --text-key.{nearest_name_hint(missing, names)}"


def _value_text(value: object, text_key: str, origin: str) -> bytes:
    if value is None or value in ("", b""):
        raise UnreadableError(_empty(f"{origin}: {text_key!r}"))
    if isinstance(value, bytes):  # parquet of writers that do not mark text as such
        return _checked_text(value)
    if not isinstance(value, str):
        raise DataError(f"{origin}: {text_key!r} is not a string; name the right one with --text-key.")
    return value.encode()  # raises UnicodeEncodeError: JSON can spell half a surrogate pair


def _read_parquet(path: Path, column: str) -> Iterator[Unread]:
    pyarrow = imported_pyarrow(path)
    row = 0

    def text(scalar: Any, origin: str) -> bytes:
        return _value_text(scalar.as_py(), column, origin)

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"{path} has no column {column!r}{_choices(column, names)}")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[column]):
                for scalar in batch.column(0):
                    row += 1
                    origin = f"{path}, row {row}"
                    yield origin, partial(text, scalar, origin)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is a truncated or corrupt parquet file ({error}); fetch it again.") from error
