"""Recurrent: linear attention; a query reads the sum that earlier tokens have left, without softmax."""

from abc import abstractmethod

from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planner import AttentionPlanner, SequenceAttention


class Recurrent(Mechanism):
    """Each head sums k v^T of the tokens so far, which fade at a fixed rate."""

    @property
    def accesses(self) -> frozenset[Access]:
        return frozenset({Access.STATE})

    @property
    def heads_differ(self) -> bool:
        return True

    @abstractmethod
    def decay(self, num_heads: int) -> Tensor:
        """Return the rates s >= 0, float64 `[num_heads]`, of all query heads: a token n back weighs exp(-s n)."""

    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        # The rate of a head depends on its number among all heads, not among the local ones.
        return planner.scan(self.decay(planner.share.all_heads.query)[planner.share.slice])

    def useful_flops(self, rows: Rows, head_dim: int, value_dim: int) -> int:
        # A query reads one sum that stands for all keys, `unmasked_pairs` counts it as one. Two multiply-adds per
        # element of the state `[D, Dv]`: k v^T into it, q out of it.
        return 4 * self.unmasked_pairs(rows) * head_dim * value_dim
