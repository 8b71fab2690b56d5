"""State: of a recurrence only the sums that stretches of tokens leave behind travel, whatever their length.

LASP-2 (arXiv 2502.07563) with documents and any layout: every rank scans its stretches as if nothing came before them,
all ranks learn all sums by one all-gather, and each adds to its outputs what the sums of the stretches before it give.
Backward likewise: gradients of what came in, all-gathered, are those of what was left. A layout that leaves a rank more
than a few stretches is dealt anew first, and its outputs come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.linear_attention.state import Segment, order
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Heads, RoutingSource, Saved, Sizes, no_routing
from farspan.kernels.recurrent_attention import recurrent_attention_backward, recurrent_attention_forward
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.reshard import Reshard
from farspan.parallel.context_parallel.strategy import (
    STRATEGIES,
    DistributedAttention,
    Move,
    Queries,
    ShardedPlanner,
    Strategy,
    Volume,
)
from farspan.parallel.layout import Shards, equal_chunks

MOST_STRETCHES = 2
"""Per rank, as zigzag has them; layouts with more are dealt anew."""


@final
class States(Strategy):
    """For recurrences alone; works under every layout."""

    name, serves = "state", frozenset({Access.STATE})

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if mechanism.accesses <= cls.serves:
            return None
        return (
            f"strategy 'state' moves the sums of recurrences, which {type(mechanism).__name__} is not; "
            "set parallel.strategy='ring'."
        )

    _planned: "tuple[Shards, _Stretches] | None" = None
    """Of the last sequence: layers whose rates differ have their stretches in common."""

    def scan(self, planner: ShardedPlanner, decay: Tensor) -> DistributedAttention:
        shards = planner.shards
        if self._planned is None or self._planned[0] is not shards:
            self._planned = shards, _Stretches.plan(shards, self.channel.rank)
        rank, planned = self.channel.rank, self._planned[1]
        return _StatePassingAttention(
            tokens_local=shards.tokens_local,
            heads=planner.share.local_heads,
            routing_width=0,
            channel=self.channel,
            tokens=planned.tokens,
            reshard=planned.reshard,
            runs=planned.runs,
            stretches=planned.everywhere[rank],
            most=planned.most,
            influence=_influence(planned.everywhere, planned.most, decay),
            decay=decay,
            backend=planner.backend,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Stretches:
    """What is scanned where, whatever the rates.

    redeal: how rows are dealt anew first, if they are. tokens: of this rank's rows then. runs: slices of these, each a
    stretch. everywhere: the stretches of all ranks; most: that any rank has.
    """

    reshard: Reshard | None
    tokens: Tensor
    runs: tuple[slice, ...]
    everywhere: tuple[tuple[Segment, ...], ...]
    most: int

    @staticmethod
    def plan(shards: Shards, rank: int) -> "_Stretches":
        reshard = None
        runs = [_runs(index) for index in shards.index]
        sequence = order(shards.rows)
        is_sorted = torch.equal(sequence, torch.arange(len(sequence)))
        if max(map(len, runs)) > MOST_STRETCHES or not is_sorted:
            dealt = equal_chunks(len(shards.rows), shards.degree)
            index = torch.cat((sequence, sequence.new_full((1,), -1)))[dealt]
            target = Shards(rows=shards.rows, index=index)
            reshard, shards = Reshard.plan(shards, target, rank), target
            runs = [[slice(0, shards.tokens_local)]] * shards.degree
        held = [shards.rows_of(holder) for holder in range(shards.degree)]
        return _Stretches(
            reshard=reshard,
            tokens=shards.index[rank],
            runs=tuple(runs[rank]),
            everywhere=tuple(
                tuple(Segment.of(rows.slice(run)) for run in of_holder)
                for rows, of_holder in zip(held, runs, strict=True)
            ),
            most=max(map(len, runs)),
        )


def _runs(index: Tensor) -> list[slice]:
    """Return the slices of a rank's rows, int64 tokens, that are stretches of the sequence; padding belongs to any."""
    breaks = (index.diff() != 1) & (index[1:] >= 0)
    starts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist()]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(index)], strict=True)]


def _influence(stretches: Sequence[Sequence[Segment]], most: int, decay: Tensor) -> Tensor:
    """Return by how much the sum that one stretch left weighs at the first token of another, float64.

    `[Hq, P x most, P x most]`, by reader and writer, rank by rank: exp(-s (first position - last position)) if the
    second comes earlier and ends in the document in which the first begins, else 0.
    """
    size = len(stretches) * most
    first, last = torch.full((2, size), -1), torch.full((2, size), -2)
    for rank, of_rank in enumerate(stretches):
        for number, segment in enumerate(of_rank):
            if segment.tokens:
                place = rank * most + number
                first[:, place], last[:, place] = torch.tensor(segment.first), torch.tensor(segment.last)
    distance = first[1][:, None] - last[1]
    heard = (first[0][:, None] == last[0]) & (first[0] >= 0)[:, None] & (distance > 0)
    # Clamped, since what comes later would be infinite before it is dropped.
    return torch.exp(-decay.double()[:, None, None] * distance.clamp(min=0)) * heard


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _StatePassingAttention(DistributedAttention):
    """runs: slices of this rank's rows, dealt anew if `reshard` says so; `most` any rank has; stretches: their rows."""

    channel: Channel
    tokens: Tensor
    reshard: Reshard | None
    runs: tuple[slice, ...]
    stretches: tuple[Segment, ...]
    most: int
    influence: Tensor
    decay: Tensor
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        if self.reshard is not None:
            q, k, v = self.reshard.go((q, k, v), self.channel, kind="state_qkv")
        out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=accumulation_dtype(q.dtype), device=q.device)
        left = out.new_zeros(self.most, q.shape[1], q.shape[2], v.shape[2])
        for number, (run, segment) in enumerate(zip(self.runs, self.stretches, strict=True)):
            out[run], state = recurrent_attention_forward(
                q[run], k[run], v[run], segment, self.decay, backend=self.backend
            )
            left[number] = state.value
        entering = self._weighted(self._all(left), self._heard())
        for number, (run, segment) in enumerate(zip(self.runs, self.stretches, strict=True)):
            rows, weight = self._opening(run, segment, out)
            read = torch.einsum("thd,hdv->thv", q[rows].to(out.dtype) * weight, entering[number])
            out[rows] += read
        out, saved = out.to(q.dtype), Saved((q, k, v, entering))
        if self.reshard is not None:
            (out,) = self.reshard.come_back((out,), self.channel, kind="state_out")
        return out, saved

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, entering = saved.tensors
        if self.reshard is not None:
            (dout,) = self.reshard.go((dout,), self.channel, kind="state_dout")
        dtype = accumulation_dtype(q.dtype)
        dentering = torch.zeros_like(entering)
        dq, dk, dv = (torch.empty_like(x, dtype=dtype) for x in (q, k, v))
        for number, (run, segment) in enumerate(zip(self.runs, self.stretches, strict=True)):
            rows, weight = self._opening(run, segment, dq)
            dentering[number] = torch.einsum("thd,thv->hdv", q[rows].to(dtype) * weight, dout[rows].to(dtype))
        dleft = self._weighted(self._all(dentering), self._heard(backward=True))
        for number, (run, segment) in enumerate(zip(self.runs, self.stretches, strict=True)):
            dq[run], dk[run], dv[run], _ = recurrent_attention_backward(
                dout[run], dleft[number], q[run], k[run], v[run], segment, self.decay, backend=self.backend
            )
            rows, weight = self._opening(run, segment, dq)
            dq[rows] += torch.einsum("thv,hdv->thd", dout[rows].to(dtype), entering[number]) * weight
        if self.reshard is None:
            return dq, dk, dv
        gradients = [gradient.to(dout.dtype) for gradient in (dq, dk, dv)]
        return tuple(self.reshard.come_back(gradients, self.channel, kind="state_dqkv"))

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """A rank's sums to (P-1) others, `most x Hq` matrices, each way; if dealt anew, also rows there and back."""
        width = sizes.head_dim * sizes.value_dim * sizes.accumulation_bytes
        states = (self.channel.size - 1) * self.most * self.heads.query * width
        moved = Move(Volume(forward=states, backward=states), self.channel, hidden=False)
        if self.reshard is None:
            return (moved,)
        leaving, arriving = self.reshard.moved_rows(self.channel.rank)
        inputs = self.heads.query * sizes.head_dim + self.heads.kv * sizes.kv_width
        outputs = self.heads.query * sizes.value_dim
        dealt_anew = Volume(
            forward=(leaving * inputs + arriving * outputs) * sizes.element_bytes,
            backward=(leaving * outputs + arriving * inputs) * sizes.element_bytes,
        )
        return moved, Move(dealt_anew, self.channel, hidden=False)

    @property
    def queries(self) -> Queries:
        return Queries(self.tokens, self.heads.query)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """All ranks' sums, those that come in, gradients as they are summed and, if dealt anew, the rows as dealt."""
        width = sizes.head_dim * sizes.value_dim * sizes.accumulation_bytes
        states = (self.channel.size + 2) * self.most * self.heads.query * width
        queries, keys = self.heads.query * sizes.kv_width, self.heads.kv * sizes.kv_width
        rows = (queries + keys) * len(self.tokens)
        return states + rows * (sizes.accumulation_bytes + (sizes.element_bytes if self.reshard else 0))

    def _all(self, mine: Tensor) -> Tensor:
        """Return all ranks' `[most, Hq, D, Dv]` set end to end, rank by rank."""
        return torch.cat(self.channel.all_gather(mine, kind="state"))

    def _heard(self, *, backward: bool = False) -> Tensor:
        """Return how much each stretch of this rank hears of all; backward, how much it is heard."""
        influence = self.influence.transpose(1, 2) if backward else self.influence
        return influence[:, self.channel.rank * self.most : (self.channel.rank + 1) * self.most]

    def _weighted(self, states: Tensor, weight: Tensor) -> Tensor:
        """Return sums `[most, Hq, D, Dv]` of all states by weight `[Hq, most, states]`."""
        return torch.einsum("hms,shdv->mhdv", weight.to(states), states)

    def _opening(self, run: slice, segment: Segment, like: Tensor) -> tuple[slice, Tensor]:
        """Return the rows of the document that a run begins with, and how much what came before weighs there.

        exp(-s (position - first position)), `[rows, Hq, 1]`: what came in is as of the first token.
        """
        rows = segment.rows.slice(slice(0, segment.tokens))
        count = int((rows.document == segment.first.document).sum())
        distance = rows.position[:count].double() - segment.first.position
        weight = torch.exp(-distance[:, None] * self.decay.double())
        return slice(run.start, run.start + count), weight.to(like)[:, :, None]


STRATEGIES.add(States.name, States)
