"""TrainState: where a run stands; with parameters and optimizer state it is all that a resume needs."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(kw_only=True, slots=True)
class TrainState:
    """step: updates done. sequences: samples consumed, the global cursor into the data. tokens: labelled tokens seen.

    seed: of every random stream. Streams are functions of (seed, step), so that none has a state of its own: see
    `seed_step`. data_fingerprint: of the training data that the cursor points into.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    seed: int = 0
    data_fingerprint: str = ""

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.__slots__:
            setattr(self, name, state[name])

    def seed_step(self, data_rank: int) -> None:
        """Seed torch's random numbers for the next step, as a resumed run will seed them again."""
        generator = torch.Generator().manual_seed(self.seed)
        stream = torch.randint(2**62, (), generator=generator).item()
        torch.manual_seed((int(stream) + self.step * 1_000_003 + data_rank * 7919) % 2**62)
