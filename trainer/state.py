"""TrainState: where a run stands; with parameters and optimizer state it is all that a resume needs."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(kw_only=True, slots=True)
class TrainState:
    """step: updates done. sequences: samples consumed, the global cursor into the data. tokens: labelled tokens seen.

    Random streams have no state of their own: each is a function of (seed, step), see `seed_step`.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as values that JSON can hold."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; raises KeyError when a part of it is missing."""
        values = {name: state[name] for name in self.__slots__}
        for name, value in values.items():
            setattr(self, name, value)

    def seed_step(self, seed: int, data_rank: int) -> None:
        """Seed torch's random numbers for the next step, as a resumed run will seed them again."""
        digest = hashlib.sha256(f"{seed}/{self.step}/{data_rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7]))
