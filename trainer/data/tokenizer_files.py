"""The tokenizer's files that prepared data keep, and whether data have the token ids of another tokenizer."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from farspan.errors import DataError
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import TOKENIZER_FILE, TOKENIZER_FOLDER

IDLE = {"version", "truncation", "padding", "decoder"}
"""Parts of a tokenizer.json that leave the ids of a text as they are."""


def contents(folder: Path, paths: Iterable[Path]) -> dict[str, bytes]:
    """Return the files among `paths` by name, relative to `folder`; raises DataError."""
    try:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths) if path.is_file()}
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): change its permissions.") from None


def files_beside_split(split: TokenSource) -> dict[str, bytes]:
    """Return the tokenizer's files in the folder of prepared data that a split lies in, none in older data.

    Raises DataError where they have changed.
    """
    folder = split.folder.parent / TOKENIZER_FOLDER
    files = contents(folder, folder.rglob("*"))
    if TOKENIZER_FILE in files and split.meta.tokenizer_sha256 not in (None, _sha256(files[TOKENIZER_FILE])):
        raise DataError(
            f"{folder / TOKENIZER_FILE} was changed since the data was prepared: restore it, or prepare the data again."
        )
    return files


def has_ids_of(split: TokenSource, tokenizer: bytes) -> bool:
    """Return whether a tokenizer.json gives texts the ids that a split has; that of older data may do so.

    Files with another hash are compared by what decides about ids. Raises DataError.
    """
    prepared = files_beside_split(split).get(TOKENIZER_FILE)
    if prepared is None:
        return split.meta.tokenizer_sha256 in (None, _sha256(tokenizer))
    return have_same_ids(prepared, tokenizer)


def have_same_ids(first: bytes, second: bytes) -> bool:
    """Return whether two files tokenizer.json give texts the same ids."""
    return first == second or _encoding(first) == _encoding(second)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _encoding(content: bytes) -> Any:
    """Return what a tokenizer.json says about the ids of a text, in one form for all versions of the library.

    `prepare` turns truncation and padding off, and the decoder turns ids into text. Other bytes are returned as given.
    """
    try:
        fields = json.loads(content)
        merges = fields["model"].get("merges")
    except (ValueError, TypeError, KeyError, AttributeError):
        return content
    if merges:
        fields["model"]["merges"] = [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    return _without_defaults({name: fields[name] for name in fields if name not in IDLE})


def _without_defaults(value: Any) -> Any:
    """Older versions of the library leave such fields out."""
    if isinstance(value, dict):
        return {name: _without_defaults(part) for name, part in value.items() if part is not None and part is not False}
    return [_without_defaults(part) for part in value] if isinstance(value, list) else value
