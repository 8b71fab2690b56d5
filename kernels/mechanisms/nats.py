"""NAtS, neural attention search (arXiv 2502.13251): each KV head decides how long it keeps each token.

A router gives every token three logits per KV head, and the highest decides: a global token is seen by all later ones,
a local one up to and including the next global one, a sliding one by the `window` tokens after it. The first and last
token of a document are global. In training the caller adds Gumbel noise to the logits; gradients go straight through
the choice, to `kernels/lifetimes/gradient.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.kv_lifetime import KVLifetime
from farspan.kernels.lifetimes.lifetimes import GLOBAL, LOCAL, DocumentOrder, Lifetimes
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class NAtS(KVLifetime):
    """Keys are global, local or sliding, as the router decides for each token and KV head."""

    window: int = 16
    """Number of tokens after a sliding token that see it."""
    temperature: float = 1.0
    """Temperature of the softmax whose gradient the router learns from."""
    penalty: float = 5e-7
    """Added to the gradient of a key's type for a lifetime of a full document, whatever the scale of the loss."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not self.penalty >= 0:
            raise ValueError(f"penalty={self.penalty} must be at least 0")

    @property
    def adds_gradient(self) -> bool:
        return self.penalty > 0

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls(window=5), cls(window=20, temperature=0.5, penalty=0.1)

    def penalties(self, lifetimes: Lifetimes, order: DocumentOrder) -> Tensor:
        """Global: penalty * (length - position) / length to its type; local: penalty * (last - position) / length."""
        position, length, _ = order.to(lifetimes.columns.device).of_tokens
        # [Hk, tokens]: a global key lives to the end of its document, a local one to the next global one.
        active = torch.where(lifetimes.types == GLOBAL, length, lifetimes.last) - position
        share = self.penalty * active.double() / length
        kind = lifetimes.types
        of_types = (share * (kind == GLOBAL), share * (kind == LOCAL), torch.zeros_like(share))
        return torch.stack(of_types, dim=-1).transpose(0, 1)  # [Hk, tokens, 3] -> [tokens, Hk, 3]


MECHANISMS.add("nats", NAtS)
