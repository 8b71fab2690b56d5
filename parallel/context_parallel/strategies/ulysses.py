"""Strategies that split heads: Ulysses over all ranks, hybrids along one axis of a grid, with tokens along the other.

Ulysses (arXiv 2309.14509): an all-to-all turns each rank's tokens of all heads into all tokens of its heads; see
head_exchange.py for an example. Hybrid (USP, arXiv 2405.07719): along the axis of tokens, any strategy that supports
the mechanism: a ring or, for a recurrence, states. Example: 4 ranks, two node groups of 2, 2 KV heads:

    ulysses         ranks 0 1 2 3      heads are split over all
    hybrid          ranks 0 1 | 2 3    heads are split within a group, where all-to-alls are cheap; rings 0-2 and 1-3
    hybrid_outer    ranks 0 2 | 1 3    heads are split across groups; rings 0-1 and 2-3 within groups
"""

from abc import abstractmethod
from typing import ClassVar, final

from torch import Tensor

from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare
from farspan.parallel.comm import Channel, Unconnected
from farspan.parallel.context_parallel.head_exchange import HeadParallelAttention, RowPermutation
from farspan.parallel.context_parallel.strategy import STRATEGIES, ShardedPlanner, Strategy, grid_unsupported_reason
from farspan.parallel.layout import Shards


class HeadParallelStrategy(Strategy):
    """Needs the query heads to divide by the ranks that split them, and KV heads and ranks one way or the other."""

    setting: ClassVar[str]
    """Says how many ranks split the heads."""
    along_tokens: ClassVar[tuple[str, ...]] = ("ring", "state")
    """Strategies for the axis of tokens; the first that supports the mechanism is used."""

    @classmethod
    @abstractmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        """Return the number of ranks that split the heads."""

    @abstractmethod
    def axes(self, index: Tensor) -> tuple[Channel | None, Channel | None, Tensor]:
        """Return the axis of heads, that of tokens, and the index map `[P, T]` by both, `[Pt, Ph, T]`."""

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        head_degree = cls.head_degree(degree, inner)
        if (unsupported_reason := _heads_unsupported_reason(cls.name, cls.setting, heads, head_degree)) is not None:
            return unsupported_reason
        local = Heads(query=heads.query // head_degree, kv=max(heads.kv // head_degree, 1))
        strategies = map(STRATEGIES.get, cls.along_tokens)
        reasons = [strategy.unsupported_reason(mechanism, local, degree // head_degree) for strategy in strategies]
        return None if None in reasons else reasons[0]

    def plan_with(self, planner: ShardedPlanner, mechanism: Mechanism) -> HeadParallelAttention:
        shards, share = planner.shards, planner.share
        head_axis, token_axis, index = self.axes(shards.index)
        assert head_axis is not None, "a grid has two axes"
        assert token_axis is not None, "a grid has two axes"
        # The heads of a share that this rank attends with.
        num_heads = len(share.head_range) // head_axis.size
        start = share.head_range.start + head_axis.rank * num_heads
        local_share = HeadShare(all_heads=share.all_heads, head_range=range(start, start + num_heads))
        # Tokens that each rank of the token axis has after the exchange: [Pt, Ph, T] -> [Pt, Ph * T]
        index = index.flatten(1)
        # In the order of the sequence, so that documents are contiguous whatever the layout; padding comes last.
        orders = index.masked_fill(index < 0, len(shards.rows)).argsort(dim=1, stable=True)
        token_shards = Shards(rows=shards.rows, index=index.gather(1, orders))  # [Pt, Ph * T]
        strategy = next(
            strategy
            for strategy in map(STRATEGIES.get, self.along_tokens)
            if strategy.unsupported_reason(mechanism, local_share.local_heads, token_axis.size) is None
        )(token_axis, grad_comm_dtype=self.grad_comm_dtype)
        return HeadParallelAttention(
            planner=planner,
            routing_width=mechanism.routing_width,
            head_axis=head_axis,
            permutation=RowPermutation.of(orders[token_axis.rank]),
            attention=strategy.plan(mechanism, token_shards, local_share, backend=planner.backend),
        )


def _heads_unsupported_reason(strategy: str, setting: str, heads: Heads, degree: int) -> str | None:
    """Return why heads cannot be split over `degree` ranks, with the degrees that work; None if they can."""

    def divides(n: int) -> bool:
        return heads.query % n == 0 and (heads.kv % n == 0 or n % heads.kv == 0)

    works = [n for n in range(1, heads.query + 1) if divides(n)]
    if degree in works:
        return None
    return (
        f"strategy {strategy!r} cannot split {heads.query} query heads and {heads.kv} KV heads over "
        f"{setting}={degree} ranks; these degrees work: {', '.join(map(str, works))}."
    )


@final
class Ulysses(HeadParallelStrategy):
    """Each rank has all tokens of its heads."""

    name, setting, along_tokens = "ulysses", "parallel.context", ("single",)

    @classmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        return degree

    def axes(self, index: Tensor) -> tuple[Channel | None, Channel | None, Tensor]:
        return self.channel, Unconnected(0, 1), index[None]  # [P, T] -> [1, P, T]


class _Grid(HeadParallelStrategy):
    """Heads are split along one of the channel's two axes."""

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return grid_unsupported_reason(cls.name, degree, inner) or super().unsupported_reason(
            mechanism, heads, degree, inner
        )


@final
class Hybrid(_Grid):
    """Heads are split within node groups."""

    name, setting = "hybrid", "parallel.context_inner"

    @classmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        return inner

    def axes(self, index: Tensor) -> tuple[Channel | None, Channel | None, Tensor]:
        by_group = index.unflatten(0, (-1, self.channel.inner_size))  # [P, T] -> [P/W, W, T]
        return self.channel.inner, self.channel.outer, by_group


@final
class HybridOuter(_Grid):
    """Heads are split across node groups."""

    name, setting = "hybrid_outer", "parallel.context / parallel.context_inner"

    @classmethod
    def head_degree(cls, degree: int, inner: int) -> int:
        return degree // inner

    def axes(self, index: Tensor) -> tuple[Channel | None, Channel | None, Tensor]:
        by_group = index.unflatten(0, (-1, self.channel.inner_size))  # [P, T] -> [P/W, W, T]
        return self.channel.outer, self.channel.inner, by_group.transpose(0, 1)


for strategy in (Ulysses, Hybrid, HybridOuter):
    STRATEGIES.add(strategy.name, strategy)
