"""Ring attention (arXiv 2310.01889): keys and values travel around the ranks while queries stay.

    step 0        step 1        step P-1      rank r attends to its own chunk first, then to the chunk of rank r-1,
    r: chunk r    chunk r-1  …  chunk r+1     r-2, …; the next chunk is on its way during the work on this one.

In the backward pass the chunks make the same journey, followed one step behind by the sum of their gradients, which
needs one hop more to be home. Sums over chunks are float32 (float64 for float64 inputs), on the wire too.
"""

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from farspan.kernels.attend import attend, attend_backward
from farspan.kernels.mechanism import Gathered, Heads, Holding, Masked, Mechanism, Routed
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.plan import Plan
from farspan.kernels.whole import Saved
from farspan.parallel.comm import Channel, Shift
from farspan.parallel.gathered import GatheredAttend, gathered_heads
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, Attend, AttentionShape, Strategy, Volume

CHUNK_TAG, GRADIENT_TAG = 1, 2


@final
class Ring(Strategy):
    """One ring for every layout."""

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int) -> str | None:
        if not isinstance(mechanism, (Masked, Gathered)):
            return (
                f"strategy 'ring' moves keys and values, which {type(mechanism).__name__} does not attend to; "
                "set parallel.strategy='ulysses'."
            )
        return None

    @classmethod
    def volume(cls, shape: AttentionShape, degree: int) -> Volume:
        """Forward (P-1) hops of a chunk; backward the same and P hops of its gradient in the accumulation dtype.

        What a choice is made from is summed over all ranks: 2 (P-1)/P of its bytes.
        """
        if degree == 1:
            return Volume(forward=0, backward=0)
        elements = shape.tokens_local * shape.heads.kv * (shape.head_dim + shape.value_dim)
        chunks = (degree - 1) * elements * shape.element_bytes
        choice = 2 * (degree - 1) * shape.total_bytes // degree
        return Volume(forward=chunks + choice, backward=chunks + degree * elements * shape.accumulation_bytes)

    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        if isinstance(mechanism, Gathered):
            return GatheredAttend(
                tokens_local=shards.tokens_local,
                heads=heads,
                routing_width=mechanism.routing_width,
                mechanism=mechanism,
                shards=shards,
                rank=self.channel.rank,
                total=partial(self.channel.all_reduce, kind="ring_choice"),
                plan=lambda dealt: self._plan(mechanism.among(), dealt, gathered_heads(heads), backend=backend),
            )
        assert isinstance(mechanism, Masked)
        rank, degree = self.channel.rank, self.channel.size
        queries, visibility = shards.rows_of(rank), mechanism.visibility()
        owners = [(rank - step) % degree for step in range(degree)]
        plans = tuple(Plan.build(queries, shards.rows_of(owner), visibility, heads=heads.query) for owner in owners)
        holding = None
        if isinstance(mechanism, Routed):
            total = partial(self.channel.all_reduce, kind="ring_choice")
            holding = Holding(
                mechanism=mechanism,
                rows=queries,
                everyone=shards.rows,
                heads=range(heads.query),
                all_heads=heads,
                total=total,
            )
        return _RingAttend(
            tokens_local=shards.tokens_local,
            heads=heads,
            routing_width=mechanism.routing_width,
            channel=self.channel,
            holding=holding,
            plans=plans,
            backend=backend,
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _RingAttend(Attend):
    channel: Channel
    holding: Holding | None
    plans: tuple[Plan, ...]
    """One per step: local queries against the chunk that is here at that step."""
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        chunk = _Chunk.pack(k, v)
        plans = self._choose(q, k)
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for step, plan in enumerate(plans):
            shift = self._send_on(chunk, step)
            if not plan.is_empty:
                merge_(out, lse, *attend(q, chunk.key, chunk.value, plan, backend=self.backend))
            chunk = chunk.arrive(shift)
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse), plans)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, out, lse = saved.tensors
        dtype = accumulation_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        chunk, arriving = _Chunk.pack(k, v), None
        gradient = _Chunk(torch.zeros(chunk.buffer.shape, dtype=dtype, device=q.device), k.shape, v.shape)
        for step, plan in enumerate(saved.kept):
            shift = self._send_on(chunk, step)
            parts = None
            if not plan.is_empty:
                parts = attend_backward(dout, q, chunk.key, chunk.value, out, lse, plan, backend=self.backend)
            # The gradient of this chunk comes from the previous rank, which had the chunk one step ago.
            gradient = gradient.arrive(arriving)
            if parts is not None:
                for total, part in zip((dq, gradient.key, gradient.value), parts, strict=True):
                    total += part
            if self.channel.size > 1:
                arriving = self.channel.shift(gradient.buffer, kind="ring_dkv", tag=GRADIENT_TAG)
            chunk = chunk.arrive(shift)
        gradient = gradient.arrive(arriving)
        return dq, gradient.key, gradient.value

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[-1]

    def _choose(self, q: Tensor, k: Tensor) -> tuple[Plan, ...]:
        """Let a routed mechanism choose, once, from summaries of all ranks' rows."""
        if self.holding is None:
            return self.plans
        selection = self.holding.mechanism.select(q, k, self.holding)
        return tuple(plan.choosing(selection) for plan in self.plans)

    def _send_on(self, chunk: "_Chunk", step: int) -> Shift | None:
        """Start sending the chunk to the next rank, unless this is its last step."""
        if step == len(self.plans) - 1:
            return None
        return self.channel.shift(chunk.buffer, kind="ring_kv", tag=CHUNK_TAG)


class _Chunk:
    """Keys `[tokens, Hk, D]` and values `[tokens, Hk, Dv]` as views of one flat buffer, sent as one message."""

    def __init__(self, buffer: Tensor, key_shape: torch.Size, value_shape: torch.Size) -> None:
        self.buffer = buffer
        self.key, self.value = buffer.split((key_shape.numel(), value_shape.numel()))
        self.key, self.value = self.key.view(key_shape), self.value.view(value_shape)

    @staticmethod
    def pack(key: Tensor, value: Tensor) -> "_Chunk":
        return _Chunk(torch.cat((key.reshape(-1), value.reshape(-1))), key.shape, value.shape)

    def arrive(self, shift: Shift | None) -> "_Chunk":
        """Return the chunk that comes next, or this one when nothing is on its way."""
        return self if shift is None else _Chunk(shift.wait(), self.key.shape, self.value.shape)


STRATEGIES.add("ring", Ring)
