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
from farspan.kernels.planner import RoutingSource, Sizes
from farspan.parallel.context_parallel.moving_kv import (
    Gradients,
    GradReturn,
    KeysAndValues,
    KVMovingStrategy,
    KVSchedule,
)
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, ShardedPlanner


@final
class Gather(KVMovingStrategy):
    """All-gather of keys and values, for any layout and any numbers of heads."""

    name = "gather"

    def kv_schedule(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVSchedule:
        global_tokens = planner.shards.index.flatten()  # [P, T] -> [P * T]
        return _GatherKVSchedule(planner, attention_mask, (global_tokens,))


@final
class _GatherKVSchedule(KVSchedule):
    """One part: the rows of all ranks set end to end."""

    def kv_parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        local = KeysAndValues.pack(k, v)
        chunks = [local.like(buffer) for buffer in self.channel.all_gather(local.buffer, kind="gather_kv")]
        # P x [T, Hk, D] -> [P * T, Hk, D]
        yield torch.cat([chunk.key for chunk in chunks]), torch.cat([chunk.value for chunk in chunks])

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        return _GatherGradReturn(self, k, v)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """A rank's keys and values to P-1 others, forward and backward; backward also the gradients of P-1 others."""
        numbers = (self.channel.size - 1) * self.kv_rows * sizes.kv_width
        gathered = numbers * sizes.element_bytes
        gradients = numbers * self.gradient_bytes(sizes)
        return (Move(forward=gathered, backward=gathered + gradients, channel=self.channel),)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """The keys and values of all ranks, twice while they are concatenated; their gradients, computed and packed."""
        numbers = self.channel.size * self.kv_rows * sizes.kv_width
        return numbers * (2 * sizes.element_bytes + sizes.accumulation_bytes + self.gradient_bytes(sizes))


@final
class _GatherGradReturn(GradReturn):
    """Each rank's gradients are sent to it by an all-to-all and summed in the order of the ranks."""

    packed: Tensor | None = None

    def add(self, gradients: Gradients) -> None:
        if gradients is not None:
            # [P * T, Hk, D] -> [P, T, Hk, D] -> [P, T * Hk * D]
            by_rank = (x.to(self.comm_dtype).unflatten(0, (self.channel.size, -1)).flatten(1) for x in gradients)
            self.packed = torch.cat(tuple(by_rank), dim=1)

    def receive(self) -> None:
        packed = self.packed
        if packed is None:
            # Every rank has to take part: zeros, [numbers] -> [P, numbers]
            packed = self.total.buffer.to(self.comm_dtype).expand(self.channel.size, -1)
        arrived = self.channel.all_to_all(packed, kind="gather_dkv")
        self.total = self.total.like(arrived.sum(dim=0, dtype=self.total.buffer.dtype))


STRATEGIES.add(Gather.name, Gather)
