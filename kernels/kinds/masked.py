"""Masked: attention to the keys that a mask shows, known from the rows' positions and documents alone."""

from abc import abstractmethod

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask, count_keys_per_query
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planner import AttentionPlanner, Heads, KeyRouting, SequenceAttention
from farspan.kernels.planning.plan import Plan


class Masked(Mechanism):
    """A static mask; kinds that narrow it further, by content, derive from this one and have a `key_routing`."""

    @property
    def accesses(self) -> frozenset[Access]:
        return frozenset({Access.MASK})

    @property
    def heads_differ(self) -> bool:
        return not self.attention_mask().is_uniform

    @property
    def static_mask(self) -> AttentionMask | None:
        return self.attention_mask() if self.accesses == {Access.MASK} else None

    @property
    def is_windowed(self) -> bool:
        return not self.attention_mask().is_plain

    @property
    def is_causal(self) -> bool:
        attention_mask = self.attention_mask()
        grid = attention_mask.neighborhood
        return attention_mask.causal or (grid is not None and all(one.causal for one in grid.dimensions))

    @abstractmethod
    def attention_mask(self) -> AttentionMask:
        """Return which rows see which."""

    def key_routing(self, planner: AttentionPlanner) -> KeyRouting:
        """Return how the keys that the mask shows are narrowed by content."""
        return KeyRouting()

    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        return planner.attend(self.attention_mask(), self.key_routing(planner))

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        return count_keys_per_query(self.attention_mask(), global_rows)

    def unmasked_pairs(self, rows: Rows) -> int:
        attention_mask = self.attention_mask()
        # The mean over heads, where these have windows of their own.
        heads = len(attention_mask.window) if isinstance(attention_mask.window, tuple) else 1
        return Plan.build(rows, rows, attention_mask, heads=heads).unmasked_pairs

    def is_dense_up_to(self, longest: int) -> bool:
        rows, attention_mask = Rows.packed([longest]), self.attention_mask()
        dense, grid = AttentionMask(causal=attention_mask.causal), attention_mask.neighborhood
        if grid is not None:
            return longest <= grid.tokens and all(
                one.window == one.length and not one.causal for one in grid.dimensions
            )
        return torch.equal(count_keys_per_query(attention_mask, rows), count_keys_per_query(dense, rows))

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        # Windows of heads have to be as many as the heads.
        try:
            self.attention_mask().by_heads(heads.query)
        except ValueError as error:
            return str(error)
        return None
