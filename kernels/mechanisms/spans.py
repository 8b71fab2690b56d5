"""Per-head spans that grow with the input: mixture of sparse attention, MoA (arXiv 2406.14909, section 3).

Head h sees the last S_h = alpha_h + beta_h * N tokens of an input of N, and the first tokens of the document. Spans are
multiples of 64 tokens, as in the published code: floor(alpha / 64) + beta * floor(N / 64), rounded down, at least 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Spans(Masked):
    """A causal window per query head, alpha + beta * length tokens wide."""

    alpha: tuple[float, ...]
    """Constant part of each query head's span, in tokens."""
    beta: tuple[float, ...]
    """Part of each query head's span that grows with the input, in tokens per token."""
    length: int
    """Length of the input that the spans are for, in tokens."""
    sinks: int = 64
    """Tokens at the start of a document that are visible from everywhere."""
    block: int = 64
    """Spans are multiples of this many tokens."""

    def __post_init__(self) -> None:
        if len(self.alpha) != len(self.beta) or not self.alpha:
            raise ValueError(f"alpha has {len(self.alpha)} heads and beta {len(self.beta)}: give both for every head")
        if self.length < 1 or self.block < 1:
            raise ValueError(f"length={self.length} and block={self.block} must be at least 1")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        heads = (8.0, 0.0, -40.0, 16.0, 0.0, 64.0, 8.0, 0.0), (0.0, 0.125, 0.25, 0.0, 1.0, 0.0, 0.125, 0.5)
        return (cls(alpha=heads[0], beta=heads[1], length=320, sinks=8, block=8),)

    def attention_mask(self) -> AttentionMask:
        # Both parts are rounded to blocks before they are added, as published.
        blocks = self.length // self.block
        spans = (int(alpha // self.block + beta * blocks) for alpha, beta in zip(self.alpha, self.beta, strict=True))
        return AttentionMask(window=tuple(max(span, 1) * self.block for span in spans), sinks=self.sinks)


MECHANISMS.add("spans", Spans)
