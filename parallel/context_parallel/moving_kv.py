"""Attention where tokens are sharded and keys move: local queries attend to all keys, part by part.

Shared by all strategies that move keys and values; each has its own `KVSchedule`, by which these arrive and their
gradients return. On rank 0 of two, under `ring`:

    forward     part 0: own keys      attend, merge        part 1: keys of rank 1     attend, merge
    backward    part 0: own keys      dq +=, return dk dv  part 1: keys of rank 1     dq +=, return dk dv
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward, prepare_attention
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Access
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.planner import InputSpec, KeyRouting, RoutingSource, Saved, Sizes, no_routing
from farspan.parallel.context_parallel.strategy import (
    DistributedAttention,
    Move,
    ShardedPlanner,
    Strategy,
    all_reduce_move,
)


class KVExchange(ABC):
    """How keys and values come to the ranks, as far as it is known before queries select blocks."""

    def __init__(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> None:
        self.planner, self.attention_mask = planner, attention_mask
        self.strategy, self.channel = planner.strategy, planner.strategy.channel
        # Local rows, each once for each KV head.
        self.kv_rows = planner.shards.tokens_local * planner.share.local_heads.kv

    def gradient_bytes(self, sizes: Sizes) -> int:
        """Bytes of an element of a gradient that is sent."""
        return sizes.gradient_bytes(rounded=self.strategy.rounds_gradients)

    @abstractmethod
    def for_selection(self, selection: BlockSelection | PackedSelection | None) -> "KVSchedule":
        """Return the schedule of the keys that the local queries need; every rank has to call."""

    @abstractmethod
    def prepare(self, device: torch.device, selection: BlockSelection | PackedSelection | None) -> "KVSchedule | None":
        """Make what is known on `device` before queries select; return the schedule, if it is.

        selection: one such as they will make, of blocks that mean nothing; None without selections.
        """

    @abstractmethod
    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Return what this rank sends; routing: of the full sequence."""

    @abstractmethod
    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """Return the most bytes of parts and gradients that this rank has, or is sending, at once."""


class KVSchedule(KVExchange):
    """How the keys and values of all ranks come to this one, in parts, planned for one sharded sequence.

    plans: local queries against each part. tokens: of the keys of each part, int64 `[keys]`, -1 for padding.
    """

    def __init__(self, planner: ShardedPlanner, attention_mask: AttentionMask, tokens: Sequence[Tensor]) -> None:
        super().__init__(planner, attention_mask)
        self.tokens = tokens
        self.plans = [planner.plan_of(attention_mask, planner.tokens, keys) for keys in tokens]

    def for_selection(self, selection: BlockSelection | PackedSelection | None) -> "KVSchedule":
        """Return this schedule: it brings all keys, selected or not."""
        return self

    def prepare(self, device: torch.device, selection: BlockSelection | PackedSelection | None) -> "KVSchedule":
        """Make what `kv_parts` and `grad_return` find on `device`; here nothing."""
        return self

    @abstractmethod
    def kv_parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values of each part, of the local ones k `[tokens_local, Hk, D]` and v `[.., Hk, Dv]`.

        Called forward and again backward. Each part is used before the next is asked for, which is sent meanwhile.
        """

    @abstractmethod
    def grad_return(self, k: Tensor, v: Tensor) -> "GradReturn":
        """Return what collects the gradients of local keys and values of these shapes."""


class KeysAndValues:
    """Keys `[tokens, Hk, D]` and values `[tokens, Hk, Dv]` as views of one flat buffer, sent as one message."""

    def __init__(self, buffer: Tensor, key_shape: torch.Size, value_shape: torch.Size) -> None:
        self.buffer = buffer
        # [tokens x Hk x D + tokens x Hk x Dv] -> [tokens, Hk, D] and [tokens, Hk, Dv]
        key, value = buffer.split((key_shape.numel(), value_shape.numel()))
        self.key, self.value = key.view(key_shape), value.view(value_shape)

    @staticmethod
    def pack(key: Tensor, value: Tensor) -> "KeysAndValues":
        buffer = torch.cat((key.reshape(-1), value.reshape(-1)))  # [tokens x Hk x (D + Dv)]
        return KeysAndValues(buffer, key.shape, value.shape)

    def like(self, buffer: Tensor) -> "KeysAndValues":
        """Return another buffer, of the same shapes."""
        return KeysAndValues(buffer, self.key.shape, self.value.shape)


Gradients = tuple[Tensor, Tensor] | None
"""dk and dv of a part; None if its keys are not attended to, which other ranks may not know."""


class GradReturn(ABC):
    """Returns the gradients of keys and values to their owners, which sum them in the accumulation dtype.

    total: the sum so far. comm_dtype: the dtype in which gradients travel.
    """

    def __init__(self, kv_schedule: KVSchedule, k: Tensor, v: Tensor) -> None:
        dtype = accumulation_dtype(k.dtype)
        # Gradients of many parts are summed here, wider than they are saved.
        buffer = torch.zeros(k.numel() + v.numel(), dtype=dtype, device=k.device)
        self.total = KeysAndValues(buffer, k.shape, v.shape)
        self.comm_dtype = k.dtype if kv_schedule.strategy.rounds_gradients else dtype
        self.channel = kv_schedule.channel

    @abstractmethod
    def add(self, gradients: Gradients) -> None:
        """Add the gradients of the next part; called once for each part, in order."""

    @abstractmethod
    def receive(self) -> None:
        """Take what is on its way into the total."""

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the local keys and values, summed over all ranks."""
        self.receive()
        return self.total.key, self.total.value

    def _add_local(self, gradients: Gradients) -> None:
        if gradients is not None:
            self.total.key.add_(gradients[0])
            self.total.value.add_(gradients[1])


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class MovingKVAttention(DistributedAttention):
    """Attention of the local queries to the parts of a schedule."""

    kv_exchange: KVExchange
    key_routing: KeyRouting

    def prepare(self, spec: InputSpec) -> None:
        routed = self.key_routing.prepare(spec)
        schedule = self.kv_exchange.prepare(spec.device, None if routed is None else routed.selection)
        if schedule is not None:
            for plan, keys in zip(schedule.plans, schedule.tokens, strict=True):
                prepare_attention(plan, keys, routed, spec, backend=self.backend)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, *routing = inputs
        # Routing is agreed on by all ranks before any key moves: strategies may move only what it leaves.
        routed = self.key_routing.route(q, k, *routing)
        kv_schedule = self.kv_exchange.for_selection(routed.selection)
        masked = kv_schedule.plans
        plans = [routed.narrow(plan, keys) for plan, keys in zip(masked, kv_schedule.tokens, strict=True)]
        routing_gradient = routed.start(q, *routing)
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for number, (key, value) in enumerate(kv_schedule.kv_parts(k, v)):
            # A rank passes keys on even if its own queries see none of them.
            if plans[number].is_empty:
                continue
            merge_(out, lse, *attention_forward(q, key, value, plans[number], backend=self.backend))
            routing_gradient.observe(q, key, value, masked[number])
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse, *routing_gradient.saved), (kv_schedule, plans, routed))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, out, lse, *of_forward = saved.tensors
        kv_schedule, plans, routed = saved.extras
        routing_gradient = routed.resume(*of_forward)
        # The queries stay, and so does their gradient; those of keys and values go back part by part.
        dq = torch.zeros(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        grad_return = kv_schedule.grad_return(k, v)
        for number, (key, value) in enumerate(kv_schedule.kv_parts(k, v)):
            if plans[number].is_empty:
                grad_return.add(None)
                continue
            part_dq, dk, dv = attention_backward(dout, q, key, value, out, lse, plans[number], backend=self.backend)
            dq += part_dq
            masked, tokens = kv_schedule.plans[number], kv_schedule.tokens[number]
            routing_gradient.add(dout, q, key, value, out, plan=masked, tokens=tokens)
            grad_return.add((dk, dv))
        return dq, *grad_return.finish(), *routing_gradient.gradients()

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[4]

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """What the exchange sends, and what all ranks sum for the routing and its gradient."""
        summed = all_reduce_move(self.key_routing.all_reduced(sizes), self.channel)
        return *self.kv_exchange.moves(sizes, routing), summed

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """Backward: what the exchange holds, the gradient of the queries and that of the part at hand."""
        dq = self.tokens_local * self.heads.query * sizes.head_dim * sizes.accumulation_bytes
        return dq + self.kv_exchange.working_bytes(sizes, routing)


class KVMovingStrategy(Strategy):
    """Moves keys and values, along the schedule that it gives."""

    serves = frozenset({Access.MASK, Access.BLOCKS, Access.LIFETIMES})
    not_served = (
        "moves keys and values, which {mechanism} does not attend to; set parallel.strategy='state' or 'ulysses'."
    )
    fallback_strategy = "state"

    @abstractmethod
    def kv_schedule(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVSchedule:
        """Plan how the keys that a mask (of the local heads) shows come to this rank's queries."""

    def kv_exchange_of_blocks(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVExchange:
        """Plan the same where the queries select blocks of these keys: by default all come, selected or not."""
        return self.kv_schedule(planner, attention_mask)

    def attend(
        self, planner: ShardedPlanner, attention_mask: AttentionMask, key_routing: KeyRouting
    ) -> DistributedAttention:
        # What moves may depend on a selection of blocks, but not on lifetimes: evicted keys are moved all the same.
        exchange_of = self.kv_exchange_of_blocks if key_routing.selects_blocks else self.kv_schedule
        return MovingKVAttention(
            planner=planner,
            routing_width=key_routing.routing_width,
            kv_exchange=exchange_of(planner, attention_mask),
            key_routing=key_routing,
        )
