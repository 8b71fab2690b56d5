"""Hybrid (USP, arXiv 2405.07719): heads are split along one axis of a grid of ranks, tokens along the other.

Along the first, an all-to-all as in Ulysses; along the second, any strategy that supports the mechanism: a ring or, for
a recurrence, states. Example: 4 ranks, two node groups of 2, 2 KV heads:

    hybrid          ranks 0 1 | 2 3    heads are split within a group, where all-to-alls are cheap; rings 0-2 and 1-3
    hybrid_outer    ranks 0 2 | 1 3    heads are split across groups; rings 0-1 and 2-3 within groups
"""

from abc import abstractmethod
from typing import ClassVar, final

from torch import Tensor

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.head_exchange import (
    HeadParallelAttention,
    RowPermutation,
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
"""Strategies for the axis of tokens; the first that supports the mechanism is used."""


class _Grid(Strategy):
    """Heads are split along one of the channel's two axes."""

    setting: ClassVar[str]

    @classmethod
    @abstractmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        """Return the number of ranks that split the heads."""

    @abstractmethod
    def axes(self) -> tuple[Channel | None, Channel | None]:
        """Return the axis of heads and that of tokens."""

    @abstractmethod
    def by_axis(self, index: Tensor) -> Tensor:
        """Return `[ranks of tokens, ranks of heads, T]` of an index map `[P, T]`."""

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if (unsupported_reason := grid_unsupported_reason(cls.name, degree, inner)) is not None:
            return unsupported_reason
        head_degree = cls.head_degree(degree, inner)
        if (unsupported_reason := heads_unsupported_reason(cls.name, cls.setting, heads, head_degree)) is not None:
            return unsupported_reason
        local = Heads(query=heads.query // head_degree, kv=max(heads.kv // head_degree, 1))
        reasons = [
            STRATEGIES.get(name).unsupported_reason(mechanism, local, degree // head_degree) for name in ALONG_TOKENS
        ]
        return None if None in reasons else reasons[0]

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        head_axis, token_axis = self.axes()
        assert head_axis is not None, "a grid has two axes"
        assert token_axis is not None, "a grid has two axes"
        local_share = local_heads(share, head_axis)
        # Tokens that each rank of the token axis has after the exchange: [Pt, Ph, T] -> [Pt, Ph * T]
        index = self.by_axis(shards.index).flatten(1)
        # Sorted, so that documents are contiguous; padding comes last.
        orders = index.masked_fill(index < 0, len(shards.rows)).argsort(dim=1, stable=True)
        token_shards = Shards(rows=shards.rows, index=index.gather(1, orders))  # [Pt, Ph * T]
        strategy = next(
            strategy
            for strategy in map(STRATEGIES.get, ALONG_TOKENS)
            if strategy.unsupported_reason(mechanism, local_share.local_heads, token_axis.size) is None
        )(token_axis, grad_comm_dtype=self.grad_comm_dtype)
        return HeadParallelAttention(
            tokens_local=shards.tokens_local,
            heads=share.local_heads,
            routing_width=mechanism.routing_width,
            name=self.name,
            channel=head_axis,
            tokens=token_shards.index[token_axis.rank],
            permutation=RowPermutation.of(orders[token_axis.rank]),
            attention=strategy.plan(mechanism, token_shards, local_share, backend=backend),
            share=local_share,
            grad_comm_dtype=self.grad_comm_dtype,
        )


@final
class Hybrid(_Grid):
    """Heads are split within node groups."""

    name, setting = "hybrid", "parallel.context_inner"

    @classmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        return inner

    def axes(self) -> tuple[Channel | None, Channel | None]:
        return self.channel.inner, self.channel.outer

    def by_axis(self, index: Tensor) -> Tensor:
        return index.unflatten(0, (-1, self.channel.inner_size))  # [P, T] -> [P/W, W, T]


@final
class HybridOuter(_Grid):
    """Heads are split across node groups."""

    name, setting = "hybrid_outer", "parallel.context / parallel.context_inner"

    @classmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        return degree // inner

    def axes(self) -> tuple[Channel | None, Channel | None]:
        return self.channel.outer, self.channel.inner

    def by_axis(self, index: Tensor) -> Tensor:
        return index.unflatten(0, (-1, self.channel.inner_size)).transpose(0, 1)  # [P, T] -> [W, P/W, T]


for strategy in (Hybrid, HybridOuter):
    STRATEGIES.add(strategy.name, strategy)
