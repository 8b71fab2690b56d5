"""TrainState: where a run stands; with parameters and optimizer state it is all that a resume needs."""

from dataclasses import asdict, dataclass, field
from typing import Any

from farspan.trainer.data.packing import stream_hash


@dataclass(kw_only=True, slots=True)
class TrainState:
    """step: steps done. sequences: samples consumed, the global cursor into the data. tokens: labeled tokens seen.

    stream: hash of all samples consumed so far. skipped: steps that were no update, those at the end in_a_row.
    recent_losses, recent_norms: of the last updates, what `skip.sigma` compares with; empty without it.
    Random streams have no state of their own: each is a function of a sequence's index, see `data/packing.py`.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    stream: str = ""
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values that JSON can hold."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; raises KeyError when a part of it is missing."""
        values = {name: state[name] for name in self.__slots__}
        for name, value in values.items():
            setattr(self, name, value)

    def advance(self, *, sequences: int, tokens: int, fingerprint: int) -> None:
        """Count a step that has consumed `sequences`, whose fingerprints add up to `fingerprint`."""
        self.step += 1
        self.sequences += sequences
        self.tokens += tokens
        self.stream = stream_hash(self.stream, fingerprint)
