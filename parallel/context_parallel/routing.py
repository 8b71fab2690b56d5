"""Choice: what a mechanism chooses, once, from what all ranks hold; strategies that deal tokens ask for it.

The choice is part of the plans of local queries against keys, whichever rank the keys come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.lifetime_shard import LifetimeShard, TypeLearning
from farspan.kernels.lifetimes.lifetimes import Lifetimes
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Heads, KVLifetime, LocalShard, Masked, Mechanism, Routed, TokenChoice, identity
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.strategy import Chosen, HeadShare, Move, Sample, Sizes, Volume
from farspan.parallel.layout import Shards


class Choices(NamedTuple):
    """selection: of the local queries, of a routed mechanism. lifetimes: of all keys, where keys have them."""

    selection: BlockSelection | None = None
    lifetimes: Lifetimes | None = None

    def applied(self, plans: Sequence[Plan], tokens: Sequence[Tensor]) -> tuple[Plan, ...]:
        """Return the plans of local queries with what was chosen; tokens: of the keys of each, int64 `[keys]`."""
        if self.lifetimes is not None:
            last = (self.lifetimes.take(of_keys).last for of_keys in tokens)
            return tuple(plan.living(x) for plan, x in zip(plans, last, strict=True))
        if self.selection is not None:
            return tuple(plan.choosing(self.selection) for plan in plans)
        return tuple(plans)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Nothing is chosen where both are None.

    holding: of a routed mechanism. ageing: of one whose keys have lifetimes.
    """

    local_shard: LocalShard | None = None
    lifetime_shard: LifetimeShard | None = None

    @staticmethod
    def of(mechanism: Masked, shards: Shards, share: HeadShare, channel: Channel, *, strategy: str) -> "Choice":
        """Return the choice of a mechanism for one dealt sequence; bytes are counted under the strategy's name."""
        rank = channel.rank
        if isinstance(mechanism, Routed):
            local_shard = LocalShard(
                mechanism=mechanism,
                rows=shards.rows_of(rank),
                global_rows=shards.rows,
                heads=share.which,
                all_heads=share.all_heads,
                total=partial(channel.all_reduce, kind=f"{strategy}_choice"),
            )
            return Choice(local_shard=local_shard)
        if isinstance(mechanism, KVLifetime):
            lifetime_shard = LifetimeShard(
                mechanism=mechanism,
                global_rows=shards.rows,
                rows=shards.index[rank],
                share=LifetimeShard.share_of(share.all_heads, share.which),
                total=partial(channel.all_reduce, kind=f"{strategy}_types"),
            )
            return Choice(lifetime_shard=lifetime_shard)
        return Choice()

    def choose(self, q: Tensor, k: Tensor, *routing: Tensor) -> Choices:
        """Choose by the local q, k and routing; every rank has to call."""
        if self.lifetime_shard is not None:
            return Choices(lifetimes=self.lifetime_shard.lifetimes(*routing))
        if self.local_shard is not None:
            return Choices(selection=self.local_shard.mechanism.select(q, k, self.local_shard))
        return Choices()

    def learning(self, lifetimes: Lifetimes | None, saved: Sequence[Tensor]) -> TypeLearning | None:
        """Return what collects the gradient of lifetimes in a backward pass; saved: their causal lse and routing."""
        if self.lifetime_shard is None or lifetimes is None:
            return None
        causal_lse, routing = saved
        return TypeLearning(self.lifetime_shard, lifetimes, causal_lse, routing)


def moves_of_choice(mechanism: Mechanism, global_rows: Rows, here: Heads, sizes: Sizes, channel: Channel) -> Move:
    """Return what a rank sends of what a mechanism sums over all ranks, to choose by and to learn from: 2 (P-1)/P."""
    chosen_by = mechanism.all_reduce_bytes(global_rows, here, sizes.head_dim)
    learned_from = mechanism.gradient_all_reduce_bytes(global_rows, here, sizes.accumulation_bytes)
    forward, backward = (2 * (channel.size - 1) * total // channel.size for total in (chosen_by, learned_from))
    return Move(Volume(forward=forward, backward=backward), channel, overlapped=False)


def choose_alone(
    mechanism: Mechanism, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor
) -> Chosen:
    """Return what a mechanism chooses of a whole sequence that one process has."""
    if isinstance(mechanism, TokenChoice):
        return mechanism.choose(routing[0][..., 0].float(), global_rows)
    if isinstance(mechanism, Routed):
        return mechanism.select(q, k, _held_alone(mechanism, global_rows, global_rows, heads))
    return None


def typical_choice(mechanism: Mechanism, global_rows: Rows, heads: Heads, *, most: int | None = None) -> Chosen:
    """Return what a mechanism chooses of normal queries, keys and routing, the same at every call.

    most: queries that choose, if there are more; a sample then, spread evenly, of a routed mechanism's choice.
    """
    generator, tokens = torch.Generator().manual_seed(0), len(global_rows)
    if isinstance(mechanism, TokenChoice):
        return mechanism.choose(torch.randn(tokens, heads.kv, generator=generator), global_rows)
    if not isinstance(mechanism, Routed):
        return None
    one_in = -(-tokens // most) if most else 1
    index = torch.arange(0, tokens, one_in)
    q, k = (torch.randn(len(index), n, 16, generator=generator) for n in (heads.query, heads.kv))
    selection = mechanism.select(q, k, _held_alone(mechanism, global_rows.take(index), global_rows, heads))
    if one_in == 1:
        return selection
    place = torch.full((tokens,), -1)
    place[index] = torch.arange(len(index))
    return Sample(selection.of_queries(place), one_in)


def _held_alone(mechanism: Routed, rows: Rows, global_rows: Rows, heads: Heads) -> LocalShard:
    """Return the holding of one who has these rows, of all heads, and sums over nobody else."""
    return LocalShard(
        mechanism=mechanism,
        rows=rows,
        global_rows=global_rows,
        heads=range(heads.query),
        all_heads=heads,
        total=identity,
    )
