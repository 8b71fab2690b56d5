"""Dense attention: every query sees its full document (arXiv 1706.03762, equation 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Dense(Masked):
    """Full attention inside each document."""

    causal: bool = True
    """Whether later tokens are hidden, as a language model needs."""

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls(causal=True), cls(causal=False)

    def is_dense_up_to(self, longest: int) -> bool:
        return False  # its name says so

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=self.causal)


MECHANISMS.add("dense", Dense)
