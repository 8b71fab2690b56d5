"""State: ranks exchange only the states that segments of a recurrence leave behind, whatever their length.

LASP-2 (arXiv 2502.07563) with documents and any layout: every rank runs its segments as if nothing came before them,
all ranks all-gather the states, and each adds to its outputs the contribution of the segments before. Example: zigzag,
2 ranks, chunks A B C D of one document in the order of the sequence:

    rank 0: segments A D    rank 1: segments B C    all-gather: states of A D B C
    the state that enters D is the decayed sum of those of A, B and C; influence[D] = [A: d_A, D: 0, B: d_B, C: d_C]

Backward likewise: gradients of entering states, all-gathered, give those of the states left behind. A layout with more
than a few segments per rank is resharded first, and its outputs are sent back.
Legend: M segments per rank, D head dim, Dv value head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.linear_attention.state import Segment, order
from farspan.kernels.mechanism import Access
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import InputSpec, RoutingSource, Saved, Sizes, no_routing
from farspan.kernels.recurrent_attention import (
    prepare_recurrence,
    recurrent_attention_backward,
    recurrent_attention_forward,
)
from farspan.parallel.context_parallel.reshard import Reshard
from farspan.parallel.context_parallel.strategy import (
    STRATEGIES,
    DistributedAttention,
    Move,
    Queries,
    ShardedPlanner,
    Strategy,
)
from farspan.parallel.layout import Shards, equal_chunks

MAX_SEGMENTS = 2
"""Per rank, as zigzag has them; layouts with more are resharded."""


@final
class States(Strategy):
    """For recurrences only; works under every layout."""

    name, serves = "state", frozenset({Access.STATE})

    not_served = "moves the sums of recurrences, which {mechanism} is not; set parallel.strategy='ring'."
    # The segments of the last sequence: layers whose decay differs share them.
    _planned: "tuple[Shards, _Segments] | None" = None

    def scan(self, planner: ShardedPlanner, decay: Tensor) -> DistributedAttention:
        shards, rank = planner.shards, self.channel.rank
        planned = self._planned
        if planned is None or planned[0] is not shards:
            self._planned = planned = shards, _Segments.plan(shards, rank)
        segments = planned[1]
        influence = _influence(segments.by_rank, segments.max_segments, decay)
        return _StatePassingAttention(
            planner=planner,
            routing_width=0,
            segments=segments,
            influence=DeviceCopies(influence),
            decay=decay,
            rates=DeviceCopies(decay.double()),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Segments:
    """The segments of all ranks, whatever the decay.

    reshard: None if the layout stays. tokens: of this rank's rows after it. local: which of these rows each of its
    segments has. opening: the rows of the document that each begins with, and how many positions they are after its
    first token, float64 `[rows]`. by_rank: the segments of every rank; max_segments: the most of any rank.
    """

    reshard: Reshard | None
    tokens: Tensor
    local: list[tuple[slice, Segment]]
    opening: list[tuple[slice, DeviceCopies]]
    by_rank: list[list[Segment]]
    max_segments: int

    @staticmethod
    def plan(shards: Shards, rank: int) -> "_Segments":
        reshard = None
        slices = [_segment_slices(index) for index in shards.index]
        sequence = order(shards.rows)
        is_sorted = torch.equal(sequence, torch.arange(len(sequence)))
        if max(map(len, slices)) > MAX_SEGMENTS or not is_sorted:
            # Contiguous chunks of the sorted sequence; chunk index -1, padding, takes the last entry.
            chunks = equal_chunks(len(shards.rows), shards.degree)
            index = torch.cat((sequence, sequence.new_full((1,), -1)))[chunks]
            target = Shards(rows=shards.rows, index=index)
            reshard, shards = Reshard.plan(shards, target, rank), target
            slices = [[slice(0, shards.tokens_local)]] * shards.degree
        by_rank = []
        for owner, parts in enumerate(slices):
            rows = shards.rows_of(owner)
            by_rank.append([Segment.of(rows.slice(part)) for part in parts])
        local = [*zip(slices[rank], by_rank[rank], strict=True)]
        return _Segments(
            reshard=reshard,
            tokens=shards.index[rank],
            local=local,
            opening=[_opening(*of_segment) for of_segment in local],
            by_rank=by_rank,
            max_segments=max(map(len, slices)),
        )


def _opening(rows: slice, segment: Segment) -> tuple[slice, DeviceCopies]:
    """See `_Segments.opening`."""
    real = segment.rows.slice(slice(0, segment.tokens))
    count = int((real.document == segment.first.document).sum())
    distance = real.position[:count].double() - segment.first.position
    return slice(rows.start, rows.start + count), DeviceCopies(distance)


def _segment_slices(index: Tensor) -> list[slice]:
    """Return the slices of a rank's rows, int64 tokens, whose tokens are consecutive; padding extends any of them."""
    breaks = (index.diff() != 1) & (index[1:] >= 0)
    starts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist()]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(index)], strict=True)]


def _influence(segments: Sequence[Sequence[Segment]], max_segments: int, decay: Tensor) -> Tensor:
    """Return the weight of the state of each segment at the first token of each other, float64 `[Hq, P * M, P * M]`.

    By reader and writer: exp(-s (first position - last position)) if the writer comes earlier and ends in the document
    in which the reader begins, else 0.
    """
    size = len(segments) * max_segments
    # (document, position) of the first and last token of each segment; documents -1 and -2 match none.
    first, last = torch.full((2, size), -1), torch.full((2, size), -2)
    for rank, of_rank in enumerate(segments):
        for number, segment in enumerate(of_rank):
            if segment.tokens:
                column = rank * max_segments + number
                first[:, column], last[:, column] = torch.tensor(segment.first), torch.tensor(segment.last)
    distance = first[1][:, None] - last[1]
    reaches = (first[0][:, None] == last[0]) & (first[0] >= 0)[:, None] & (distance > 0)
    # Clamped: the exponential of a later writer would be infinite, and 0 x infinity is NaN.
    return torch.exp(-decay.double()[:, None, None] * distance.clamp(min=0)) * reaches


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _StatePassingAttention(DistributedAttention):
    segments: _Segments
    influence: DeviceCopies
    decay: Tensor
    rates: DeviceCopies

    def prepare(self, spec: InputSpec) -> None:
        reshard = self.segments.reshard
        tables = [self.influence, self.rates, *(distance for _, distance in self.segments.opening)]
        for table in tables if reshard is None else (*tables, reshard.leaving, reshard.arriving):
            table.on(spec.device)
        for _, segment in self.segments.local:
            prepare_recurrence(segment, self.decay, spec, backend=self.backend)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        if self.segments.reshard is not None:
            q, k, v = self.segments.reshard.apply((q, k, v), self.channel, kind="state_qkv")
        out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=accumulation_dtype(q.dtype), device=q.device)
        left = out.new_zeros(self.segments.max_segments, q.shape[1], q.shape[2], v.shape[2])  # [M, Hq, D, Dv]
        for number, (rows, segment) in enumerate(self.segments.local):
            out[rows], state = recurrent_attention_forward(
                q[rows], k[rows], v[rows], segment, self.decay, backend=self.backend
            )
            left[number] = state.value
        entering = self._weighted_sum(self._all_gather(left), self._weights(left.device))
        for number in range(len(self.segments.local)):
            rows, decayed = self._opening(number, out)
            # A slice: the sum is added in place.
            out[rows] += torch.einsum("thd,hdv->thv", q[rows].to(out.dtype) * decayed, entering[number])
        out, saved = out.to(q.dtype), Saved((q, k, v, entering))
        if self.segments.reshard is not None:
            (out,) = self.segments.reshard.undo((out,), self.channel, kind="state_out")
        return out, saved

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, entering = saved.tensors
        if self.segments.reshard is not None:
            (dout,) = self.segments.reshard.apply((dout,), self.channel, kind="state_dout")
        dtype = accumulation_dtype(q.dtype)
        dentering = torch.zeros_like(entering)
        dq, dk, dv = (torch.empty_like(x, dtype=dtype) for x in (q, k, v))
        for number in range(len(self.segments.local)):
            rows, decayed = self._opening(number, dq)
            dentering[number] = torch.einsum("thd,thv->hdv", q[rows].to(dtype) * decayed, dout[rows].to(dtype))
        dleft = self._weighted_sum(self._all_gather(dentering), self._weights(dentering.device, backward=True))
        for number, (rows, segment) in enumerate(self.segments.local):
            dq[rows], dk[rows], dv[rows], _ = recurrent_attention_backward(
                dout[rows], dleft[number], q[rows], k[rows], v[rows], segment, self.decay, backend=self.backend
            )
            rows, decayed = self._opening(number, dq)
            dq[rows] += torch.einsum("thv,hdv->thd", dout[rows].to(dtype), entering[number]) * decayed
        if self.segments.reshard is None:
            return dq, dk, dv
        gradients = [gradient.to(dout.dtype) for gradient in (dq, dk, dv)]
        return tuple(self.segments.reshard.undo(gradients, self.channel, kind="state_dqkv"))

    def lse(self, saved: Saved) -> None:
        return None

    def _all_gather(self, states: Tensor) -> Tensor:
        return torch.cat(self.channel.all_gather(states, kind="state"))  # P x [M, Hq, D, Dv] -> [P * M, Hq, D, Dv]

    def _weights(self, device: torch.device, *, backward: bool = False) -> Tensor:
        """Return weights of all segments at this rank's, `[Hq, M, P * M]`; backward, of this rank's at all segments."""
        influence = self.influence.on(device)
        influence = influence.transpose(1, 2) if backward else influence  # [Hq, P * M, P * M]
        return influence.unflatten(1, (self.channel.size, -1))[:, self.channel.rank]  # [Hq, P, M, P * M]

    def _weighted_sum(self, states: Tensor, weight: Tensor) -> Tensor:
        # 0 x NaN: a state that is not finite must reach those of its document only.
        bad = ~states.isfinite().all(dim=-1).all(dim=-1)  # [P * M, Hq]
        reached = ((weight > 0) & bad.t()[:, None]).any(dim=-1).t()  # [Hq, M, P * M] -> [M, Hq]
        states = states.masked_fill(bad[:, :, None, None], 0.0)
        total = torch.einsum("hms,shdv->mhdv", weight.to(states), states)  # [P * M, Hq, D, Dv] -> [M, Hq, D, Dv]
        return total.masked_fill(reached[:, :, None, None], torch.nan)

    def _opening(self, number: int, like: Tensor) -> tuple[slice, Tensor]:
        """Return the rows of the document that a segment begins with, and the decay of the entering state there.

        exp(-s (position - first position)), `[rows, Hq, 1]`: the entering state is as of the first token.
        """
        rows, distance = self.segments.opening[number]
        decayed = torch.exp(-distance.on(like.device)[:, None] * self.rates.on(like.device))  # [rows, Hq]
        return rows, decayed.to(like)[:, :, None]

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """A rank's states to P-1 others, M x Hq matrices, each way; resharded, also rows both ways."""
        width = sizes.head_dim * sizes.value_dim * sizes.accumulation_bytes
        states = (self.channel.size - 1) * self.segments.max_segments * self.heads.query * width
        moved = Move(forward=states, backward=states, channel=self.channel)
        if self.segments.reshard is None:
            return (moved,)
        leaving, arriving = self.segments.reshard.moved_rows(self.channel.rank)
        inputs = self.heads.query * sizes.head_dim + self.heads.kv * sizes.kv_width
        outputs = self.heads.query * sizes.value_dim
        resharded = Move(
            forward=(leaving * inputs + arriving * outputs) * sizes.element_bytes,
            backward=(leaving * outputs + arriving * inputs) * sizes.element_bytes,
            channel=self.channel,
        )
        return moved, resharded

    @property
    def queries(self) -> Queries:
        return Queries(self.segments.tokens, self.heads.query)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """States of all ranks, entering states, accumulated gradients and, resharded, the rows."""
        width = sizes.head_dim * sizes.value_dim * sizes.accumulation_bytes
        states = (self.channel.size + 2) * self.segments.max_segments * self.heads.query * width
        queries, keys = self.heads.query * sizes.kv_width, self.heads.kv * sizes.kv_width
        rows = (queries + keys) * len(self.segments.tokens)
        return states + rows * (sizes.accumulation_bytes + (sizes.element_bytes if self.segments.reshard else 0))


STRATEGIES.add(States.name, States)
