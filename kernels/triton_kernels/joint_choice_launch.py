# pyright: reportMissingImports=false
"""Choices of blocks by a joint ranking on a device: launches of the kernels, as many at any length.

Legend: Q queries, Hq query heads, Hk KV heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from farspan.kernels.masks.packed_selection import num_words
from farspan.kernels.planner import AllReduceSum
from farspan.kernels.triton_kernels import joint_choice as kernels
from farspan.kernels.triton_kernels.block_choice import Rule, Scores, Strided
from farspan.kernels.triton_kernels.block_choice_launch import launch

KEY_BITS, DIGIT_BITS = 32, kernels.DIGIT_BITS.value
BLOCKS, QUERIES, WARPS = 64, 16, 2
"""Blocks scored at a time, queries of a tile, and warps; found by compiling for an H100 (docs/kernels_sm90.md)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class JointRanking:
    """The pairs of all queries and blocks of a document, ranked for each head.

    table: tiles of `QUERIES` queries, see `BlockCandidates.tiles`. q: `[Q, Hq, D]`. block_means: float64
    `[Hk, D, blocks]`. all_reduce_sum: over the owners of the other queries.
    """

    q: Tensor
    block_means: Tensor
    table: Tensor
    rule: Rule
    documents: int
    all_reduce_sum: AllReduceSum

    def threshold(self, need: Tensor, span: Tensor | None, *, own: bool) -> Tensor:
        """Return the greatest keys such that pairs from there on weigh `need` or more.

        need and the result: int64 `[searches, Hq, documents]`; need is changed. span: the highest and lowest
        keys, int64 `[2, Hq, documents]`, by which pairs are weighed; None weighs each by 1. own: whether queries' own
        blocks take part.
        """
        found = torch.zeros_like(need)
        histogram = need.new_zeros(*need.shape, 1 << DIGIT_BITS)
        for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
            self._launch(
                kernels.histogram_kernel, histogram, self.rule, found, span, self.documents, shift,
                SEARCHES=len(need), OWN=own,
            )  # fmt: skip
            total = self.all_reduce_sum(histogram)
            launch(kernels.digit_kernel, need.numel(), found, need, total, histogram, shift, num_warps=2)
        return found

    def weights(self, span: Tensor) -> Tensor:
        """Return the weights of all pairs and of queries' own blocks, summed, int64 `[2, Hq, documents]`."""
        total = span.new_zeros(2, *span.shape[1:])
        self._launch(kernels.weight_kernel, total, self.rule, span, self.documents)
        return self.all_reduce_sum(total)

    def select(self, threshold: Tensor) -> Tensor:
        """Return the bits of the pairs from the threshold `[1, Hq, documents]` on, int32 `[Q, Hq, words]`."""
        words = num_words(self.block_means.shape[2])
        bits = torch.zeros(*self.q.shape[:2], words, dtype=torch.int32, device=self.q.device)
        self._launch(kernels.select_kernel, bits, self.rule, threshold, self.documents, words)
        return bits

    def _launch(self, kernel: Any, result: Tensor, *arguments: Any, **options: Any) -> None:
        (_, heads, width), (kv_heads, _, blocks) = self.q.shape, self.block_means.shape
        scores = Scores(
            Strided.of(self.q), self.block_means, blocks, width, 1.0, tl.constexpr(heads), tl.constexpr(kv_heads)
        )
        launch(
            kernel, len(self.table) * heads, result, scores, self.table, *arguments, **options,
            BLOCKS=BLOCKS, ROWS=QUERIES, num_warps=WARPS,
        )  # fmt: skip
