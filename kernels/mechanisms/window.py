"""Sliding window: a query sees its neighbors and, if asked, the first tokens of its document.

Longformer (arXiv 2004.05150), section 3.1; sinks: StreamingLLM (arXiv 2309.17453), section 3.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import MECHANISMS


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Window(Masked):
    """A sliding window, with attention sinks if asked for."""

    window: int = 1024
    """A query attends to itself and the window - 1 tokens before it; unless causal, to as many after it too."""
    sinks: int = 0
    """Tokens at the start of a document that are visible from everywhere."""
    causal: bool = True
    """Whether later tokens are hidden."""

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls(window=40, sinks=4), cls(window=7), cls(window=20, sinks=3, causal=False)

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"window_1024": cls(window=1024)}

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(causal=self.causal, window=self.window, sinks=self.sinks)


MECHANISMS.add("window", Window)
