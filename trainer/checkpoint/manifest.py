"""The manifest of a checkpoint: what it is of, and the size and SHA-256 of each of its files. It is written last."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from farspan.errors import CheckpointError
from farspan.trainer.state import TrainState

FORMAT = 2
MANIFEST = "manifest.json"
HASH = "sha256"
"""The part of a manifest that is the hash of the rest."""
START_ANEW = "start anew with another run.folder"


class DamagedError(CheckpointError):
    """A checkpoint whose files are not those that were written; an older one may serve instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What one file held when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """identity: settings by dotted name, as JSON values. train_state: see `TrainState`. files: by their names."""

    identity: Mapping[str, Any]
    train_state: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    def write(self, folder: Path) -> None:
        """Write it into `folder`, durably."""
        with (folder / MANIFEST).open("w") as file:
            file.write(_text({"format": FORMAT, **asdict(self)}))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read that of the checkpoint in `folder`; raises DamagedError where a byte of it is not as written.

        Raises CheckpointError for a manifest of another format.
        """
        try:
            text = (folder / MANIFEST).read_text()
            content = json.loads(text)
            version = content["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise damaged(folder, f"{MANIFEST} is missing or unreadable") from None
        is_whole = text == _text({name: part for name, part in content.items() if name != HASH})
        # The first format had no hash of its own.
        if version != FORMAT and (is_whole or HASH not in content):
            raise CheckpointError(
                f"checkpoint {folder} has format {version!r} but this farspan reads {FORMAT}: use the farspan that "
                f"wrote it, or {START_ANEW}."
            )
        if not is_whole:
            raise damaged(folder, f"{MANIFEST} is not as it was written")
        try:
            TrainState().load_state_dict(content["train_state"])
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            return cls(identity=dict(content["identity"]), train_state=content["train_state"], files=files)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise damaged(folder, f"{MANIFEST} lacks a part") from None


def damaged(folder: Path, cause: str) -> DamagedError:
    """Return the error for a checkpoint that cannot be used."""
    return DamagedError(f"checkpoint {folder} is damaged ({cause}): restore or delete it.")


def _text(content: Mapping[str, Any]) -> str:
    """Return the one text that stands for `content`; it ends with the hash of the rest."""
    body = json.dumps(content, indent=1, sort_keys=True)
    sha256 = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-2]},\n "{HASH}": "{sha256}"\n}}\n'
