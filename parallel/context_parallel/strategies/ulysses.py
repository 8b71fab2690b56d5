"""Ulysses (arXiv 2309.14509): an all-to-all turns each rank's tokens of all heads into all tokens of its heads."""

from typing import final

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.parallel.context_parallel.head_exchange import (
    HeadParallelAttention,
    Reordering,
    heads_unsupported_reason,
    local_heads,
)
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Strategy
from farspan.parallel.layout import Shards


@final
class Ulysses(Strategy):
    """Needs the query heads to divide by the degree, and KV heads and degree to divide one way or the other."""

    name = "ulysses"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return heads_unsupported_reason(cls.name, "parallel.context", heads, degree)

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        # In the order of the sequence, so that documents are runs again whatever the layout.
        order, mine = shards.order(), local_heads(share, self.channel)
        rows = shards.rows.take(shards.index.flatten()[order])
        return HeadParallelAttention(
            tokens_local=shards.tokens_local,
            heads=share.local_heads,
            routing_width=mechanism.routing_width,
            name=self.name,
            channel=self.channel,
            tokens=shards.index.flatten()[order],
            reordering=Reordering.of(order),
            inside=plan_sequence_attention(mechanism, rows, mine.all_heads, mine.head_range, backend=backend),
            share=mine,
            rounded=self.rounded_gradients,
        )


STRATEGIES.add(Ulysses.name, Ulysses)
