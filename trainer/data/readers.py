"""Documents from text files, folders, JSONL and parquet; errors name the file that is empty, cut or corrupt."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from farspan.errors import DataError
from farspan.registry import nearest_name_hint

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
PARQUET_BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document; `origin` is its file, with the line or row where a file holds several."""

    text: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unreadable:
    """An empty or undecodable document: skipped inside a folder when asked, else refused with `message`."""

    message: str


_Item = Document | _Unreadable


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
            items = _read_file(path, self._text_key) if path.is_file() else iter([_not_a_file(path)])
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

    def _checked(self, items: Iterator[_Item], *, skip: bool) -> Iterator[Document]:
        for item in items:
            if isinstance(item, Document):
                yield item
            elif skip:
                self.num_skipped += 1
            else:
                raise DataError(item.message)


def _read_file(path: Path, text_key: str) -> Iterator[_Item]:
    """Yield the documents of one file; raises DataError where the file is corrupt."""
    suffix = path.suffix.lower()
    num_items = 0
    try:
        if suffix in JSONL_SUFFIXES:
            items = _read_jsonl(path, text_key)
        elif suffix == PARQUET_SUFFIX:
            items = _read_parquet(path, text_key)
        else:
            items = _read_text(path)
        for item in items:
            num_items += 1
            yield item
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; fix or exclude it.") from error
    if num_items == 0:
        yield _Unreadable(message=_empty(str(path)))


def _not_a_file(path: Path) -> _Unreadable:
    return _Unreadable(message=f"{path} is a broken link or no regular file; remove it or --exclude it.")


def _empty(origin: str) -> str:
    return f"{origin} is empty; remove it, or pass its folder with --skip-unreadable."


def _undecodable(origin: str, error: UnicodeError) -> str:
    return f"{origin} is not UTF-8 text ({error}); convert it, or pass its folder with --skip-unreadable."


def _read_text(path: Path) -> Iterator[_Item]:
    data = path.read_bytes()  # not read_text, which converts newlines: byte counts have to be exact
    if not data:
        return
    try:
        yield Document(text=data.decode("utf-8"), origin=str(path))
    except UnicodeDecodeError as error:
        yield _Unreadable(message=_undecodable(str(path), error))


def _read_jsonl(path: Path, text_key: str) -> Iterator[_Item]:
    with path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            if data.isspace():
                continue
            origin = f"{path}, line {number}"
            try:
                line = data.decode("utf-8")
            except UnicodeDecodeError as error:
                yield _Unreadable(message=_undecodable(origin, error))
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin} is not JSON ({error}); fix the line (a cut file?).") from error
            yield _record_item(record, text_key, origin)


def _record_item(record: object, text_key: str, origin: str) -> _Item:
    if not isinstance(record, dict):
        raise DataError(f"{origin} is not a JSON object; each line must be an object with the key {text_key!r}.")
    if text_key not in record:
        hint = nearest_name_hint(text_key, [str(key) for key in record])
        raise DataError(f"{origin} has no key {text_key!r}; name the right one with --text-key.{hint}")
    return _value_item(record[text_key], text_key, origin)


def _value_item(value: object, text_key: str, origin: str) -> _Item:
    if value is None or value == "":
        return _Unreadable(message=_empty(f"{origin}: {text_key!r}"))
    if not isinstance(value, str):
        raise DataError(f"{origin}: {text_key!r} is not a string; name the right one with --text-key.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return _Unreadable(message=_undecodable(origin, error))
    return Document(text=value, origin=origin)


def _read_parquet(path: Path, column: str) -> Iterator[_Item]:
    if path.stat().st_size == 0:
        return
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(f"Reading {path} needs the package pyarrow; `pip install -e '.[data]'`.") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                hint = nearest_name_hint(column, names)
                raise DataError(f"{path} has no column {column!r}; name the right one with --text-key.{hint}")
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[column]):
                for scalar in batch.column(0):
                    row += 1
                    yield _scalar_item(scalar, column, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is a truncated or corrupt parquet file ({error}); fetch it again.") from error


def _scalar_item(scalar: object, column: str, origin: str) -> _Item:
    try:
        value = scalar.as_py()  # pyright: ignore[reportAttributeAccessIssue]  (pyarrow is optional)
    except UnicodeDecodeError as error:
        return _Unreadable(message=_undecodable(origin, error))
    return _value_item(value, column, origin)
