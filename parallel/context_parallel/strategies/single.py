"""Single: one rank holds the full sequence and sends nothing."""

from typing import final

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads
from farspan.kernels.sequence_attention import plan_sequence_attention
from farspan.parallel.context_parallel.strategy import STRATEGIES, LocalAttention, ShardedPlanner, Strategy


@final
class Single(Strategy):
    """Context parallelism of degree 1."""

    name = "single"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if degree != 1:
            return f"strategy 'single' keeps the sequence on one rank: set parallel.context=1 instead of {degree}."
        return None

    def plan_with(self, planner: ShardedPlanner, mechanism: Mechanism) -> LocalAttention:
        rows, share = planner.local_rows, planner.share
        attention = plan_sequence_attention(mechanism, rows, share.all_heads, share.head_range, backend=planner.backend)
        return LocalAttention(planner=planner, routing_width=mechanism.routing_width, attention=attention)


STRATEGIES.add(Single.name, Single)
