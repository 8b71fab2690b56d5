"""Gather: every rank collects the keys and values of all ranks, then attends to them at once.

One collective instead of a ring's hops, and the largest calls of the attention kernel; memory for the whole sequence's
keys and values while a layer is computed. The backward pass collects them again; gradients go home by an all-to-all
and are summed there in the accumulation dtype, rank by rank, so that their sum does not depend on who was faster.
"""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planner import HeadShare, RoutingSource, Sizes
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.moving_kv import GradReturn, KeysAndValues, KVMovingStrategy, KVSchedule
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, Volume
from farspan.parallel.layout import Shards


@final
class Gather(KVMovingStrategy):
    """All-gather of keys and values, for any layout and any numbers of heads."""

    name = "gather"

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> "_GatherKVSchedule":
        return _GatherKVSchedule(self.channel, self.rounded_gradients, attention_mask, shards, share)


@final
class _GatherKVSchedule(KVSchedule):
    """One part: the rows of all ranks, set end to end."""

    def __init__(
        self, channel: Channel, rounded: bool, attention_mask: AttentionMask, shards: Shards, share: HeadShare
    ) -> None:
        self.channel, self.rounded, self.kv_rows = channel, rounded, shards.tokens_local * share.local_heads.kv
        everywhere = shards.index.flatten()
        keys, queries = shards.rows.take(everywhere), shards.rows_of(channel.rank)
        self.plans = (Plan.build(queries, keys, attention_mask, heads=share.local_heads.query),)
        self.tokens = (everywhere,)

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mine = KeysAndValues.pack(k, v)
        chunks = [mine.like(buffer) for buffer in self.channel.all_gather(mine.buffer, kind="gather_kv")]
        yield torch.cat([chunk.key for chunk in chunks]), torch.cat([chunk.value for chunk in chunks])

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        return _GatherGradReturn(self.channel, KeysAndValues.no_gradients(k, v), k.dtype if self.rounded else None)

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """A rank's keys and values to (P-1) others, forward and backward; (P-1) gradients of others' go home."""
        numbers = (self.channel.size - 1) * self.kv_rows * sizes.kv_width
        collected = numbers * sizes.element_bytes
        gradients = numbers * sizes.gradient_bytes(rounded=self.rounded)
        return (Move(Volume(forward=collected, backward=collected + gradients), self.channel, hidden=False),)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """Everybody's keys and values, twice as they are set end to end; their gradients, found and leaving."""
        numbers = self.channel.size * self.kv_rows * sizes.kv_width
        gradients = sizes.accumulation_bytes + sizes.gradient_bytes(rounded=self.rounded)
        return numbers * (2 * sizes.element_bytes + gradients)


@final
class _GatherGradReturn(GradReturn):
    """Each rank's part of the gradients goes to it; those that arrive are summed in the order of the ranks."""

    def __init__(self, channel: Channel, gradient: KeysAndValues, wire_dtype: torch.dtype | None) -> None:
        self.channel, self.gradient = channel, gradient
        self.wire_dtype = gradient.buffer.dtype if wire_dtype is None else wire_dtype
        self.found: Tensor | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        if dk is not None and dv is not None:
            by_rank = (x.to(self.wire_dtype).unflatten(0, (self.channel.size, -1)).flatten(1) for x in (dk, dv))
            self.found = torch.cat(tuple(by_rank), dim=1)

    def finish(self) -> tuple[Tensor, Tensor]:
        found = self.found
        if found is None:
            found = self.gradient.buffer.to(self.wire_dtype).expand(self.channel.size, -1)
        arrived = self.channel.all_to_all(found, kind="gather_dkv")
        total = self.gradient.like(arrived.sum(dim=0, dtype=self.gradient.buffer.dtype))
        return total.key, total.value


STRATEGIES.add(Gather.name, Gather)
