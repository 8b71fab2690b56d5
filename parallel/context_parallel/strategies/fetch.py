"""Fetch: a rank receives the keys and values of other ranks that its own queries require, and no others.

Windows and neighborhoods require halos, documents their rows on other ranks, block-sparse and routed mechanisms the
union of the selected blocks of each head. Keys arrive in stages, from ranks at growing distances, each stage while the
one before it is computed. Example: 8 ranks; of 7 distances, stage 1 has 1 and 2, so that rank 5 receives from 4 and 3:

    stage       0        1          2          3          4
    distance    local    1 2        3 4        5 6        7
    rank 5      5        4 3        2 1        0 7        6

Gradients return along the same routes; their owner sums them in the accumulation dtype, in the order of the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import SelectedBlocks
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planner import Heads, HeadShare, RoutingSource, Sizes
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel, GradCommDtype, Transfer, grad_dtype
from farspan.parallel.context_parallel.moving_kv import (
    GradReturn,
    KeysAndValues,
    KVExchange,
    KVMovingStrategy,
    KVSchedule,
)
from farspan.parallel.context_parallel.required_keys import required_keys
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, Volume
from farspan.parallel.layout import Shards

STAGES = 4
"""Most stages for the keys of other ranks: more stages overlap more of the transfers, fewer make larger calls."""


@final
class Fetch(KVMovingStrategy):
    """Works under every layout; sends least where the keys of a query are on few ranks."""

    name = "fetch"

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> KVSchedule:
        sequence = self._sequence(attention_mask, shards, share)
        return _FetchKVSchedule(sequence, sequence.required(), sequence.requested())

    def kv_exchange_of_blocks(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> KVExchange:
        return _SelectedKVExchange(self._sequence(attention_mask, shards, share))

    def _sequence(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> "_ShardedSequence":
        return _ShardedSequence(
            channel=self.channel,
            shards=shards,
            attention_mask=attention_mask,
            heads=share.local_heads,
            grad_comm_dtype=self.grad_comm_dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _ShardedSequence:
    """One sharded sequence and what its queries may see; global rows are the ranks' rows set end to end."""

    channel: Channel
    shards: Shards
    attention_mask: AttentionMask
    heads: Heads
    grad_comm_dtype: GradCommDtype

    @property
    def global_tokens(self) -> Tensor:
        return self.shards.index.flatten()  # [P, T] -> [P * T]

    @property
    def local_tokens(self) -> Tensor:
        return self.shards.index[self.channel.rank]

    @property
    def stages(self) -> tuple[range, ...]:
        """The distances from owner to reader of each stage."""
        distances = torch.arange(1, self.channel.size).tensor_split(min(STAGES, self.channel.size - 1) or 1)
        return tuple(range(int(part[0]), int(part[-1]) + 1) for part in distances if len(part))

    def plan(self, queries: Tensor, keys: Tensor) -> Plan:
        """Plan attention of queries to keys, both tokens of the sequence."""
        rows = self.shards.rows
        return Plan.build(rows.take(queries), rows.take(keys), self.attention_mask, heads=self.heads.query)

    def required(self, selection: BlockSelection | None = None) -> Tensor:
        """Return the keys that this rank's queries require, bool `[P, T, Hk]`; selection: of these queries."""
        plan = _with_selection(self.plan(self.local_tokens, self.global_tokens), selection)
        keys = required_keys(plan, self.heads.kv)[0]
        return keys.t().unflatten(0, (self.channel.size, -1))  # [Hk, P * T] -> [P, T, Hk]

    def requested(self, selection: BlockSelection | None = None) -> Tensor:
        """Return this rank's keys that each rank requires, bool `[P, T, Hk]`; selection: of the global rows."""
        plan = _with_selection(self.plan(self.global_tokens, self.local_tokens), selection)
        return required_keys(plan, self.heads.kv, groups=self.channel.size).transpose(1, 2)  # [P, Hk, T] -> [P, T, Hk]


def _with_selection(plan: Plan, selection: BlockSelection | None) -> Plan:
    return plan if selection is None else plan.with_selection(selection)


@final
class _FetchKVSchedule(KVSchedule):
    """KV blocks: the local rows, then stage by stage the required rows of other ranks.

    required: of all ranks' rows, by this one; requested: of this rank's, by each; bool `[P, T, Hk]`.
    """

    def __init__(self, sequence: _ShardedSequence, required: Tensor, requested: Tensor) -> None:
        self.sequence, self.required, self.requested = sequence, required, requested
        rank = sequence.channel.rank
        self.stages = tuple(_Stage.of(required, requested, rank, distances) for distances in sequence.stages)
        self.tokens = (sequence.local_tokens, *(sequence.global_tokens[stage.rows] for stage in self.stages))
        self.plans = tuple(sequence.plan(sequence.local_tokens, keys) for keys in self.tokens)

    def kv_blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        transfer = self._start(0, k, v)
        yield k, v
        for number, stage in enumerate(self.stages):
            assert transfer is not None
            arrived = transfer.wait()
            transfer = self._start(number + 1, k, v)
            # Heads differ in what they require; the other heads of a row are masked, and stay 0.
            key, value = (x.new_zeros(len(stage.rows) * x.shape[1], x.shape[2]) for x in (k, v))  # [rows * Hk, D]
            slots = stage.slots.to(key.device)
            key[slots], value[slots] = arrived.split((k.shape[2], v.shape[2]), dim=1)  # [pairs, D + Dv]
            # [rows * Hk, D] -> [rows, Hk, D]
            yield key.unflatten(0, (-1, k.shape[1])), value.unflatten(0, (-1, v.shape[1]))

    def _start(self, number: int, k: Tensor, v: Tensor) -> Transfer | None:
        if number >= len(self.stages):
            return None
        stage = self.stages[number]
        leaving = stage.leaving.to(k.device)
        # [T, Hk, D] -> [T * Hk, D] -> [pairs, D + Dv]
        packed = torch.cat((k.flatten(0, 1)[leaving], v.flatten(0, 1)[leaving]), dim=1)
        return self.sequence.channel.start_all_to_all(packed, sent=stage.sent, received=stage.received, kind="fetch_kv")

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        comm_dtype = grad_dtype(self.sequence.grad_comm_dtype, k.dtype)
        return _FetchGradReturn(self, KeysAndValues.no_gradients(k, v), comm_dtype)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Requested keys and values in both passes; backward also gradients of required ones. By row and KV head."""
        rank, width = self.sequence.channel.rank, sizes.kv_width
        sent = int(self.requested.sum() - self.requested[rank].sum()) * width * sizes.element_bytes
        gradient_bytes = sizes.gradient_bytes(rounded=self.sequence.grad_comm_dtype == "compute")
        returned = int(self.required.sum() - self.required[rank].sum()) * width * gradient_bytes
        return (Move(Volume(forward=sent, backward=sent + returned), self.sequence.channel, overlapped=True),)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """The keys of two stages, in use and arriving, and their gradients, computed and packed."""
        largest = max((len(stage.rows) for stage in self.stages), default=0) * self.sequence.heads.kv
        return largest * sizes.kv_width * 2 * (sizes.element_bytes + sizes.accumulation_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Stage:
    """The transfers at a few distances between ranks, as pairs of a row and a KV head, by row, then by head.

    rows: the rows that arrive, of the global rows, int64. slots: row x Hk + head of the pairs that arrive, rows counted
    within `rows`. leaving: the same of local pairs, those to rank 0 first. sent, received: pairs to and from each rank.
    """

    rows: Tensor
    slots: Tensor
    leaving: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @staticmethod
    def of(required: Tensor, requested: Tensor, rank: int, distances: range) -> "_Stage":
        ranks, in_stage = torch.arange(len(required)), torch.tensor([*distances])
        arriving = required & torch.isin((rank - ranks).remainder(len(ranks)), in_stage)[:, None, None]  # [P, T, Hk]
        leaving = requested & torch.isin((ranks - rank).remainder(len(ranks)), in_stage)[:, None, None]
        rows = arriving.any(dim=2).flatten().nonzero().squeeze(1)  # [P, T] -> [P * T] -> [rows]
        return _Stage(
            rows=rows,
            slots=arriving.flatten(0, 1)[rows].flatten().nonzero().squeeze(1),  # [P * T, Hk] -> [rows * Hk] -> [pairs]
            leaving=leaving.flatten(1).nonzero()[:, 1],  # [P, T * Hk] -> [pairs]
            # [P, T * Hk] -> [P]
            sent=tuple(leaving.flatten(1).sum(dim=1).tolist()),
            received=tuple(arriving.flatten(1).sum(dim=1).tolist()),
        )


@final
class _FetchGradReturn(GradReturn):
    """Each stage's gradients return to their owners while the next stage is computed."""

    def __init__(self, kv_schedule: _FetchKVSchedule, gradient: KeysAndValues, comm_dtype: torch.dtype) -> None:
        self.kv_schedule, self.gradient, self.comm_dtype = kv_schedule, gradient, comm_dtype
        self.stages = iter(kv_schedule.stages)
        self.is_local = True
        self.arriving: tuple[Transfer, _Stage] | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        if self.is_local:
            self.is_local = False
            if dk is not None and dv is not None:
                self.gradient.key.add_(dk)
                self.gradient.value.add_(dv)
            return
        self._add_arrived()
        stage = next(self.stages)
        width = self.gradient.key.shape[2] + self.gradient.value.shape[2]
        if dk is None or dv is None:
            packed = self.gradient.buffer.new_zeros(len(stage.slots), width)
        else:
            slots = stage.slots.to(dk.device)
            # [rows, Hk, D] -> [rows * Hk, D] -> [pairs, D + Dv]
            packed = torch.cat((dk.flatten(0, 1)[slots], dv.flatten(0, 1)[slots]), dim=1)
        transfer = self.kv_schedule.sequence.channel.start_all_to_all(
            packed.to(self.comm_dtype), sent=stage.received, received=stage.sent, kind="fetch_dkv"
        )
        self.arriving = transfer, stage

    def finish(self) -> tuple[Tensor, Tensor]:
        self._add_arrived()
        return self.gradient.key, self.gradient.value

    def _add_arrived(self) -> None:
        if self.arriving is None:
            return
        transfer, stage = self.arriving
        arrived = transfer.wait()
        key, value = self.gradient.key.flatten(0, 1), self.gradient.value.flatten(0, 1)  # views [T * Hk, D]
        # Rank by rank: several ranks may return the gradient of a pair, and indexed addition drops duplicates.
        for rows, part in zip(stage.leaving.to(key.device).split(stage.sent), arrived.split(stage.sent), strict=True):
            key[rows] += part[:, : key.shape[1]]
            value[rows] += part[:, key.shape[1] :]
        self.arriving = None


@final
class _SelectedKVExchange(KVExchange):
    """The required keys are known once the queries have selected blocks; each rank then requests them."""

    def __init__(self, sequence: _ShardedSequence) -> None:
        self.sequence = sequence

    def for_selection(self, selection: BlockSelection | None) -> KVSchedule:
        required = self.sequence.required(selection)
        requested = self.sequence.channel.all_to_all(required, kind="fetch_requests")
        return _FetchKVSchedule(self.sequence, required, requested)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """The requested keys and, for every row and KV head of other ranks, a byte: whether it is required."""
        kv_schedule = self._typical_schedule(routing)
        requests = kv_schedule.required.numel() - kv_schedule.required[self.sequence.channel.rank].numel()
        move = Move(Volume(forward=requests, backward=0), self.sequence.channel, overlapped=False)
        return *kv_schedule.moves(sizes, routing), move

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        return self._typical_schedule(routing).working_bytes(sizes, routing)

    def _typical_schedule(self, routing: RoutingSource) -> "_FetchKVSchedule":
        """Return the schedule of the keys that all ranks select; without a full selection, of all they may select."""
        sequence, found = self.sequence, routing()
        if not isinstance(found, SelectedBlocks) or found.one_in > 1:
            return _FetchKVSchedule(sequence, sequence.required(), sequence.requested())
        rows = sequence.global_tokens, sequence.local_tokens
        of_all, of_local = (found.selection.of_queries(tokens) for tokens in rows)
        return _FetchKVSchedule(sequence, sequence.required(of_local), sequence.requested(of_all))


STRATEGIES.add(Fetch.name, Fetch)
