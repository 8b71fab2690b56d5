"""Gather: every rank all-gathers the keys and values of all ranks, then attends to them at once.

One collective instead of the hops of a ring, and the largest calls of the attention kernel; memory for the keys and
values of the full sequence while a layer is computed. The backward pass gathers them again; gradients return by an
all-to-all and are summed by their owner in the accumulation dtype in the order of the ranks, which is deterministic.
"""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planner import HeadShare, RoutingSource, Sizes
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel, GradCommDtype, grad_dtype
from farspan.parallel.context_parallel.moving_kv import GradReturn, KeysAndValues, KVMovingStrategy, KVSchedule
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, Volume
from farspan.parallel.layout import Shards


@final
class Gather(KVMovingStrategy):
    """All-gather of keys and values, for any layout and any numbers of heads."""

    name = "gather"

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> "_GatherKVSchedule":
        return _GatherKVSchedule(self.channel, self.grad_comm_dtype, attention_mask, shards, share)


@final
class _GatherKVSchedule(KVSchedule):
    """One KV block: the rows of all ranks set end to end."""

    def __init__(
        self, channel: Channel, grad_comm_dtype: GradCommDtype, attention_mask: AttentionMask, shards: Shards,
        share: HeadShare,
    ) -> None:  # fmt: skip
        self.channel, self.kv_rows = channel, shards.tokens_local * share.local_heads.kv
        self.grad_comm_dtype: GradCommDtype = grad_comm_dtype
        global_index = shards.index.flatten()  # [P, T] -> [P * T]
        keys, queries = shards.rows.take(global_index), shards.rows_of(channel.rank)
        self.plans = (Plan.build(queries, keys, attention_mask, heads=share.local_heads.query),)
        self.tokens = (global_index,)

    def kv_blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        local = KeysAndValues.pack(k, v)
        chunks = [local.like(buffer) for buffer in self.channel.all_gather(local.buffer, kind="gather_kv")]
        # P x [T, Hk, D] -> [P * T, Hk, D]
        yield torch.cat([chunk.key for chunk in chunks]), torch.cat([chunk.value for chunk in chunks])

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        return _GatherGradReturn(
            self.channel, KeysAndValues.no_gradients(k, v), grad_dtype(self.grad_comm_dtype, k.dtype)
        )

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """A rank's keys and values to P-1 others, forward and backward; backward also the gradients of P-1 others."""
        numbers = (self.channel.size - 1) * self.kv_rows * sizes.kv_width
        gathered = numbers * sizes.element_bytes
        gradients = numbers * sizes.gradient_bytes(rounded=self.grad_comm_dtype == "compute")
        return (Move(Volume(forward=gathered, backward=gathered + gradients), self.channel, overlapped=False),)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """The keys and values of all ranks, twice while they are concatenated; their gradients, computed and packed."""
        numbers = self.channel.size * self.kv_rows * sizes.kv_width
        gradients = sizes.accumulation_bytes + sizes.gradient_bytes(rounded=self.grad_comm_dtype == "compute")
        return numbers * (2 * sizes.element_bytes + gradients)


@final
class _GatherGradReturn(GradReturn):
    """Each rank's gradients are sent to it by an all-to-all and summed in the order of the ranks."""

    def __init__(self, channel: Channel, gradient: KeysAndValues, comm_dtype: torch.dtype) -> None:
        self.channel, self.gradient, self.comm_dtype = channel, gradient, comm_dtype
        self.packed: Tensor | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        if dk is not None and dv is not None:
            # [P * T, Hk, D] -> [P, T, Hk, D] -> [P, T * Hk * D]
            by_rank = (x.to(self.comm_dtype).unflatten(0, (self.channel.size, -1)).flatten(1) for x in (dk, dv))
            self.packed = torch.cat(tuple(by_rank), dim=1)

    def finish(self) -> tuple[Tensor, Tensor]:
        packed = self.packed
        if packed is None:
            # Every rank has to take part: zeros, [numbers] -> [P, numbers]
            packed = self.gradient.buffer.to(self.comm_dtype).expand(self.channel.size, -1)
        arrived = self.channel.all_to_all(packed, kind="gather_dkv")
        total = self.gradient.like(arrived.sum(dim=0, dtype=self.gradient.buffer.dtype))
        return total.key, total.value


STRATEGIES.add(Gather.name, Gather)
