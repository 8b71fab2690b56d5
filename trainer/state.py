"""Where a run stands: the state that a checkpoint keeps beside its tensors, and the records that its steps left."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(kw_only=True, slots=True)
class TrainState:
    """With parameters and optimizer state, all that a resume needs.

    Random streams have no state of their own: each is a function of a sequence's index, see `data/packing.py`.
    """

    step: int = 0
    """Steps done."""
    sequences: int = 0
    """Sequences consumed of the data in their present order: the global cursor into them."""
    tokens: int = 0
    """Labeled tokens consumed."""
    stream: str = ""
    """Hash of all sequences consumed so far."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    """Skipped steps in all, and since the last update."""
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)
    """Those of the last updates, for `skip.spike_sigma`; empty without it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values that JSON can hold."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; raises KeyError when a part of it is missing."""
        values = {name: state[name] for name in self.__slots__}
        for name, value in values.items():
            setattr(self, name, value)

    def advance(self, *, sequences: int, tokens: int, fingerprint: int) -> None:
        """Count a step over `sequences`, whose fingerprints add up to `fingerprint`."""
        self.step += 1
        self.sequences += sequences
        self.tokens += tokens
        self.stream = stream_hash(self.stream, fingerprint)


def records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each record of a run's metrics.jsonl and its line; leaves out lines that are unreadable or cut short.

    Needs no torch, so that `farspan jobs` is quick.
    """
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
            # A line without its end was cut short, even where it reads well.
            is_whole = isinstance(record["step"], int) and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError):
            continue
        if is_whole:
            yield record, line


def last_step(run: Path) -> dict[str, Any] | None:
    """Return the record of the last step in a run's folder, None before the first."""
    path = run / "metrics.jsonl"
    steps = [record for record, _ in records(path) if "loss" in record] if path.is_file() else []
    return steps[-1] if steps else None


def stream_hash(stream: str, total: int) -> str:
    """Return the hash of a stream after a step; `total` is the sum of the hashes of the step's sequences.

    A sum, so that it does not depend on how sequences are sharded over ranks.
    """
    return hashlib.sha256(f"{stream}/{total}".encode()).hexdigest()[:16]
