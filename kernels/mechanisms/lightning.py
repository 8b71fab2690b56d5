"""Lightning attention of MiniMax-01 (arXiv 2501.08313, section 2.2): linear attention with a fixed decay per head.

The rates are those of the published model code: s_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5) for head h of
H in layer l of L, whatever H. SiLU before and the gated norm after belong to the model, not to the mechanism.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.kinds.recurrent import Recurrent
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Lightning(Recurrent):
    """A fixed decay per head, slower in later layers."""

    layer: int = 0
    """The layer's number, from 0."""
    layers: int = 1
    """Layers in all; with 1, the model fills in both."""

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.layers:
            raise ValueError(f"layer={self.layer} must be at least 0 and below layers={self.layers}")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls(), cls(layer=3, layers=4)

    def in_layer(self, layer: int, layers: int) -> Self:
        return replace(self, layer=layer, layers=layers) if self.layers == 1 else self

    def decay(self, num_heads: int) -> Tensor:
        # h + 1 of the formula above
        head = torch.arange(1, num_heads + 1, dtype=torch.float64)
        return torch.exp2(-8 * head / num_heads) * (1 - self.layer / (self.layers - 1 + 1e-5) + 1e-5)


MECHANISMS.add("lightning", Lightning)
