"""Hybrid (USP, arXiv 2405.07719): heads are dealt along one axis of a grid of ranks, tokens along the other.

Along the first an all-to-all, as in Ulysses; along the second whatever the mechanism takes: a ring or, for a
recurrence, states. `hybrid` deals heads among the ranks of a neighborhood, where all-to-alls are cheap;
`hybrid_outer` among the ranks of one place in all neighborhoods.
"""

from abc import abstractmethod
from typing import ClassVar, final

from torch import Tensor

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.head_exchange import (
    HeadParallelAttention,
    Reordering,
    heads_unsupported_reason,
    local_heads,
)
from farspan.parallel.context_parallel.strategy import (
    STRATEGIES,
    DistributedAttention,
    Strategy,
    grid_unsupported_reason,
)
from farspan.parallel.layout import Shards

ALONG_TOKENS = ("ring", "state")
"""Strategies for the axis along which tokens stay dealt; the first that takes the mechanism."""


class _Grid(Strategy):
    """The channel's two axes: heads are dealt along one."""

    setting: ClassVar[str]

    @classmethod
    @abstractmethod
    def dealers(cls, degree: int, inner: int) -> int:
        """Return how many ranks heads are dealt to."""

    @abstractmethod
    def axes(self) -> tuple[Channel | None, Channel | None]:
        """Return the axis of heads and that of tokens."""

    @abstractmethod
    def by_dealers(self, index: Tensor) -> Tensor:
        """Return `[ranks of tokens, ranks of heads, tokens_local]` of an index map `[degree, tokens_local]`."""

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if (unsupported_reason := grid_unsupported_reason(cls.name, degree, inner)) is not None:
            return unsupported_reason
        dealers = cls.dealers(degree, inner)
        if (unsupported_reason := heads_unsupported_reason(cls.name, cls.setting, heads, dealers)) is not None:
            return unsupported_reason
        here = Heads(query=heads.query // dealers, kv=max(heads.kv // dealers, 1))
        refusals = [
            STRATEGIES.get(name).unsupported_reason(mechanism, here, degree // dealers) for name in ALONG_TOKENS
        ]
        return None if None in refusals else refusals[0]

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        of_heads, of_tokens = self.axes()
        assert of_heads is not None, "a grid has two axes"
        assert of_tokens is not None, "a grid has two axes"
        mine = local_heads(share, of_heads)
        groups = self.by_dealers(shards.index).flatten(1)
        # Sorted, so that documents are runs again; padding comes last.
        orders = groups.masked_fill(groups < 0, len(shards.rows)).argsort(dim=1, stable=True)
        order = orders[of_tokens.rank]
        along = next(
            strategy
            for strategy in map(STRATEGIES.get, ALONG_TOKENS)
            if strategy.unsupported_reason(mechanism, mine.local_heads, of_tokens.size) is None
        )(of_tokens, rounded_gradients=self.rounded_gradients)
        together = Shards(rows=shards.rows, index=groups.gather(1, orders))
        return HeadParallelAttention(
            tokens_local=shards.tokens_local,
            heads=share.local_heads,
            routing_width=mechanism.routing_width,
            name=self.name,
            channel=of_heads,
            tokens=together.index[of_tokens.rank],
            reordering=Reordering.of(order),
            inside=along.plan(mechanism, together, mine, backend=backend),
            share=mine,
            rounded=self.rounded_gradients,
        )


@final
class Hybrid(_Grid):
    """Heads are dealt within neighborhoods."""

    name, setting = "hybrid", "parallel.context_inner"

    @classmethod
    def dealers(cls, degree: int, inner: int) -> int:
        return inner

    def axes(self) -> tuple[Channel | None, Channel | None]:
        return self.channel.inner, self.channel.outer

    def by_dealers(self, index: Tensor) -> Tensor:
        return index.unflatten(0, (-1, self.channel.width))


@final
class HybridOuter(_Grid):
    """Heads are dealt across neighborhoods."""

    name, setting = "hybrid_outer", "parallel.context / parallel.context_inner"

    @classmethod
    def dealers(cls, degree: int, inner: int) -> int:
        return degree // inner

    def axes(self) -> tuple[Channel | None, Channel | None]:
        return self.channel.outer, self.channel.inner

    def by_dealers(self, index: Tensor) -> Tensor:
        return index.unflatten(0, (-1, self.channel.width)).transpose(0, 1)


for strategy in (Hybrid, HybridOuter):
    STRATEGIES.add(strategy.name, strategy)
