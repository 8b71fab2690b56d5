"""Rings: the journey of chunks of keys and values from rank to rank, around one ring or two nested ones.

P ranks are a grid of P/W neighborhoods of W; one ring has W = P. At step o W + i a rank has the chunk of the rank o
neighborhoods and i places before it: it gets the next chunk from its neighbor and, at the end of a round, the one
that the same place of the neighborhood before it began its round with, on its way since then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planner import HeadShare, RoutingSource, Sizes
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel, Transfer
from farspan.parallel.context_parallel.moving_kv import GradReturn, KeysAndValues, KVMovingStrategy, KVSchedule
from farspan.parallel.context_parallel.strategy import Move, Volume
from farspan.parallel.layout import Shards

INNER_TAG, OUTER_TAG, GRADIENT_TAG = 1, 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Rings:
    """size: all ranks. width: those of a neighborhood, which divides the size."""

    size: int
    width: int

    def moved(self, rank: int, outer: int, inner: int) -> int:
        """Return the rank as many neighborhoods and places further on, each around its ring."""
        a, b = divmod(rank, self.width)
        return (a + outer) % (self.size // self.width) * self.width + (b + inner) % self.width

    def owner(self, rank: int, step: int) -> int:
        """Return whose chunk `rank` has at a step."""
        outer, inner = divmod(step, self.width)
        return self.moved(rank, -outer, -inner)

    def holder(self, owner: int, step: int) -> int:
        """Return who has the chunk of `owner` at a step; after the last step, `owner` itself."""
        outer, inner = divmod(step, self.width)
        return self.moved(owner, outer, inner) if step < self.size else owner


@final
class RingKVSchedule(KVSchedule):
    """One part per step: the chunk that is here at that step."""

    def __init__(
        self, strategy: KVMovingStrategy, rings: Rings, attention_mask: AttentionMask, shards: Shards, share: HeadShare
    ) -> None:
        self.name, self.channel, self.rounded = strategy.name, strategy.channel, strategy.rounded_gradients
        self.rings, channel = rings, strategy.channel
        self.kv_rows = shards.tokens_local * share.local_heads.kv
        owners = [rings.owner(channel.rank, step) for step in range(rings.size)]
        queries = shards.rows_of(channel.rank)
        self.plans = tuple(
            Plan.build(queries, shards.rows_of(owner), attention_mask, heads=share.local_heads.query)
            for owner in owners
        )
        self.tokens = tuple(shards.index[owner] for owner in owners)

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        chunk = KeysAndValues.pack(k, v)
        following = next_round = None
        for step in range(self.rings.size):
            if following is not None:
                chunk = chunk.like(following.wait())
            if step % self.rings.width == 0 and step + self.rings.width < self.rings.size:
                next_round = self._pass_on(chunk, 1, 0, OUTER_TAG)
            goes_round = (step + 1) % self.rings.width
            following = self._pass_on(chunk, 0, 1, INNER_TAG) if goes_round else next_round
            yield chunk.key, chunk.value

    def _pass_on(self, chunk: KeysAndValues, outer: int, inner: int, tag: int) -> Transfer:
        to, source = (self.rings.moved(self.channel.rank, sign * outer, sign * inner) for sign in (1, -1))
        return self.channel.shift(chunk.buffer, kind=f"{self.name}_kv", tag=tag, to=to, source=source)

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        gradient = KeysAndValues.no_gradients(k, v)
        return _DirectGradReturn(self, gradient, k.dtype) if self.rounded else _TrailingGradReturn(self, gradient)

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Forward (P-1) hops of a chunk; backward the same, and P hops of its gradient as it is summed.

        Rounded gradients: (P-1) of them, each to the owner of its chunk. Of two rings the inner one has the hops within
        rounds, W-1 of each W.
        """
        size, rounds = self.rings.size, self.rings.size // self.rings.width
        if size == 1:
            return ()
        chunk = self.kv_rows * sizes.kv_width
        gradient = chunk * sizes.gradient_bytes(rounded=self.rounded)

        def move(chunks: int, gradients: int, channel: Channel) -> Move:
            collected = chunks * chunk * sizes.element_bytes
            return Move(Volume(forward=collected, backward=collected + gradients * gradient), channel, hidden=True)

        if self.channel.inner is None or rounds == 1:
            return (move(size - 1, size - 1 if self.rounded else size, self.channel),)
        # Rounded, a gradient crosses neighborhoods unless its owner is in this one.
        within = self.rings.width - 1 if self.rounded else size - rounds
        across = size - self.rings.width if self.rounded else rounds
        return move(size - rounds, within, self.channel.inner), move(rounds - 1, across, self.channel)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """A chunk here and one arriving, of two rings another; its gradient here, arriving, and as it was found."""
        rings = 1 if self.rings.width == self.rings.size else 2
        chunks = (1 + rings) * sizes.element_bytes + 3 * sizes.accumulation_bytes
        return self.kv_rows * sizes.kv_width * chunks


@final
class _TrailingGradReturn(GradReturn):
    """The gradient of a chunk follows it, one step behind; it needs one hop more to be home."""

    def __init__(self, kv_schedule: RingKVSchedule, gradient: KeysAndValues) -> None:
        self.kv_schedule, self.gradient, self.step = kv_schedule, gradient, 0
        self.arriving: Transfer | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        # The gradient of this chunk comes from the rank that had the chunk one step ago.
        self.finish()
        if dk is not None and dv is not None:
            self.gradient.key.add_(dk)
            self.gradient.value.add_(dv)
        rings, channel = self.kv_schedule.rings, self.kv_schedule.channel
        if rings.size > 1:
            next_owner = rings.owner(channel.rank, self.step + 1) if self.step + 1 < rings.size else channel.rank
            self.arriving = channel.shift(
                self.gradient.buffer,
                kind=f"{self.kv_schedule.name}_dkv",
                tag=GRADIENT_TAG,
                to=rings.holder(rings.owner(channel.rank, self.step), self.step + 1),
                source=rings.holder(next_owner, self.step),
            )
        self.step += 1

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.arriving is not None:
            self.gradient, self.arriving = self.gradient.like(self.arriving.wait()), None
        return self.gradient.key, self.gradient.value


@final
class _DirectGradReturn(GradReturn):
    """Each gradient, rounded once, goes to the owner of its chunk, who sums them in the order of the steps."""

    def __init__(self, kv_schedule: RingKVSchedule, gradient: KeysAndValues, dtype: torch.dtype) -> None:
        self.kv_schedule, self.gradient, self.dtype, self.step = kv_schedule, gradient, dtype, 0
        self.arriving: Transfer | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        if dk is None or dv is None:
            dk, dv = torch.zeros_like(self.gradient.key), torch.zeros_like(self.gradient.value)
        if self.step == 0:
            self.gradient.key.add_(dk)
            self.gradient.value.add_(dv)
        else:
            self.finish()
            rings, channel = self.kv_schedule.rings, self.kv_schedule.channel
            self.arriving = channel.shift(
                KeysAndValues.pack(dk.to(self.dtype), dv.to(self.dtype)).buffer,
                kind=f"{self.kv_schedule.name}_dkv",
                tag=GRADIENT_TAG,
                to=rings.owner(channel.rank, self.step),
                source=rings.holder(channel.rank, self.step),
            )
        self.step += 1

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.arriving is not None:
            self.gradient.buffer.add_(self.arriving.wait())
            self.arriving = None
        return self.gradient.key, self.gradient.value
