"""Single: one rank holds the whole sequence and nothing moves."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare, RoutingSource, Saved, SequenceAttention, Sizes, no_routing
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.parallel.context_parallel.strategy import (
    STRATEGIES,
    DistributedAttention,
    Move,
    Queries,
    Strategy,
)
from farspan.parallel.layout import Shards


@final
class Single(Strategy):
    """Context parallelism of degree 1."""

    name = "single"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if degree != 1:
            return f"strategy 'single' keeps the sequence on one rank: set parallel.context=1 instead of {degree}."
        return None

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        return _SingleRankAttention(
            tokens_local=shards.tokens_local,
            heads=share.local_heads,
            routing_width=mechanism.routing_width,
            tokens=shards.index[self.channel.rank],
            whole=plan_sequence_attention(
                mechanism, shards.rows_of(self.channel.rank), share.all_heads, share.head_range, backend=backend
            ),
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _SingleRankAttention(DistributedAttention):
    whole: SequenceAttention
    tokens: Tensor

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        return self.whole.forward(*inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return self.whole.backward(dout, saved)

    def lse(self, saved: Saved) -> Tensor | None:
        return self.whole.lse(saved)

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        return ()

    @property
    def queries(self) -> Queries:
        return Queries(self.tokens, self.heads.query)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        return 0


STRATEGIES.add(Single.name, Single)
