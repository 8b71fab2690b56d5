"""The manifest of a checkpoint: identity and state of its run, size and SHA-256 of its files. It is written last."""

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
"""The key of the hash of the rest of the manifest."""
START_AGAIN = "start again with another run.folder"


class DamagedError(CheckpointError):
    """A checkpoint whose files differ from those written; load an older one instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and hash of a file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """identity: settings by dotted name, as JSON values. train_state: of `TrainState`. files: by name."""

    identity: Mapping[str, Any]
    train_state: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    @property
    def total_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())

    @classmethod
    def of_files(cls, folder: Path, hashed: Mapping[str, FileRecord]) -> Self:
        """Return the manifest of files that no run has written; hashed: those whose records are known."""
        files = dict(hashed)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if name not in files:
                content = path.read_bytes()
                files[name] = FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        return cls(identity={}, train_state=TrainState().state_dict(), files=files)

    def write(self, folder: Path) -> None:
        """Write to `folder`, durably."""
        with (folder / MANIFEST).open("w") as file:
            file.write(_text({"format": FORMAT, **asdict(self)}))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest in `folder`; raises DamagedError where a byte of it differs from what was written.

        Raises CheckpointError for a manifest of another format.
        """
        try:
            text = (folder / MANIFEST).read_text()
            content = json.loads(text)
            version = content["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise damaged(folder, f"{MANIFEST} is missing or unreadable") from None
        is_intact = text == _text({name: part for name, part in content.items() if name != HASH})
        # Format 1 had no hash of the manifest.
        if version != FORMAT and (is_intact or HASH not in content):
            raise CheckpointError(
                f"checkpoint {folder} has format {version!r} but this farspan reads {FORMAT}: use the farspan that "
                f"wrote it, or {START_AGAIN}."
            )
        if not is_intact:
            raise damaged(folder, f"{MANIFEST} is not as it was written")
        try:
            TrainState().load_state_dict(content["train_state"])
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            return cls(identity=dict(content["identity"]), train_state=content["train_state"], files=files)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise damaged(folder, f"{MANIFEST} lacks a part") from None


def damaged(folder: Path, cause: str) -> DamagedError:
    return DamagedError(f"checkpoint {folder} is damaged ({cause}): restore or delete it.")


def _text(content: Mapping[str, Any]) -> str:
    """Return `content` as canonical JSON, with a hash of it as the last key."""
    body = json.dumps(content, indent=1, sort_keys=True)
    sha256 = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-2]},\n "{HASH}": "{sha256}"\n}}\n'
