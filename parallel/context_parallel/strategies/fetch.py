"""Fetch: a rank gets those keys and values of other ranks that its own queries need, and no others.

Windows and neighborhoods need halos, documents what they have elsewhere, block-sparse and routed mechanisms the union
of the blocks that were chosen, head by head. Keys come in stages, from ranks ever farther away, each on its way during
the work on the one before; gradients go back the way that keys came, and are summed in the accumulation dtype where
they are at home, rank by rank.
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
from farspan.parallel.comm import Channel, Transfer
from farspan.parallel.context_parallel.moving_kv import (
    GradReturn,
    KeysAndValues,
    KVExchange,
    KVMovingStrategy,
    KVSchedule,
)
from farspan.parallel.context_parallel.required_keys import needed_keys
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, Volume
from farspan.parallel.layout import Shards

STAGES = 4
"""Most stages in which the keys of other ranks come: more hide more of the transfers, fewer make larger calls."""


@final
class Fetch(KVMovingStrategy):
    """Works under every layout; moves least where the keys of a query lie on few ranks."""

    name = "fetch"

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> KVSchedule:
        sequence = self._sequence(attention_mask, shards, share)
        return _FetchKVSchedule(sequence, sequence.wanted(), sequence.given())

    def kv_exchange_of_blocks(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> KVExchange:
        return _SelectedKVExchange(self._sequence(attention_mask, shards, share))

    def _sequence(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> "_Sequence":
        return _Sequence(
            channel=self.channel,
            shards=shards,
            attention_mask=attention_mask,
            heads=share.local_heads,
            rounded=self.rounded_gradients,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Sequence:
    """One dealt sequence and what its queries may see; keys are the ranks' rows set end to end."""

    channel: Channel
    shards: Shards
    attention_mask: AttentionMask
    heads: Heads
    rounded: bool

    @property
    def global_rows(self) -> Tensor:
        """Token of each row of all ranks set end to end, int64 `[P x tokens_local]`."""
        return self.shards.index.flatten()

    @property
    def mine(self) -> Tensor:
        return self.shards.index[self.channel.rank]

    @property
    def stages(self) -> tuple[range, ...]:
        """Distances from owner to reader of each stage."""
        distances = torch.arange(1, self.channel.size).tensor_split(min(STAGES, self.channel.size - 1) or 1)
        return tuple(range(int(part[0]), int(part[-1]) + 1) for part in distances if len(part))

    def plan(self, queries: Tensor, keys: Tensor) -> Plan:
        """Plan attention of queries to keys, both tokens of the sequence."""
        rows = self.shards.rows
        return Plan.build(rows.take(queries), rows.take(keys), self.attention_mask, heads=self.heads.query)

    def wanted(self, selection: BlockSelection | None = None) -> Tensor:
        """Return what this rank needs, of what its queries chose if they did; bool `[P, tokens_local, Hk]`."""
        needed = needed_keys(_choosing(self.plan(self.mine, self.global_rows), selection), self.heads.kv)
        return needed[0].t().unflatten(0, (self.channel.size, -1))

    def given(self, selection: BlockSelection | None = None) -> Tensor:
        """Return what each rank needs of this one's keys; bool `[P, tokens_local, Hk]`."""
        plan = _choosing(self.plan(self.global_rows, self.mine), selection)
        return needed_keys(plan, self.heads.kv, groups=self.channel.size).transpose(1, 2)


def _choosing(plan: Plan, selection: BlockSelection | None) -> Plan:
    return plan if selection is None else plan.with_selection(selection)


@final
class _FetchKVSchedule(KVSchedule):
    """First the local rows, then stage by stage what is needed of those of others.

    wanted: of all ranks' rows, by this one; given: of this rank's, by each; bool `[P, tokens_local, Hk]`.
    """

    def __init__(self, sequence: _Sequence, wanted: Tensor, given: Tensor) -> None:
        self.sequence, self.wanted, self.given = sequence, wanted, given
        rank = sequence.channel.rank
        self.stages = tuple(_Stage.of(wanted, given, rank, distances) for distances in sequence.stages)
        self.tokens = (sequence.mine, *(sequence.global_rows[stage.rows] for stage in self.stages))
        self.plans = tuple(sequence.plan(sequence.mine, keys) for keys in self.tokens)

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        transfer = self._start(0, k, v)
        yield k, v
        for number, stage in enumerate(self.stages):
            assert transfer is not None
            arrived = transfer.wait()
            transfer = self._start(number + 1, k, v)
            key, value = (x.new_zeros(len(stage.rows) * x.shape[1], x.shape[2]) for x in (k, v))
            slots = stage.slots.to(key.device)
            key[slots], value[slots] = arrived.split((k.shape[2], v.shape[2]), dim=1)
            yield key.unflatten(0, (-1, k.shape[1])), value.unflatten(0, (-1, v.shape[1]))

    def _start(self, number: int, k: Tensor, v: Tensor) -> Transfer | None:
        if number >= len(self.stages):
            return None
        stage = self.stages[number]
        given = stage.given.to(k.device)
        outgoing = torch.cat((k.flatten(0, 1)[given], v.flatten(0, 1)[given]), dim=1)
        return self.sequence.channel.start_all_to_all(
            outgoing, sent=stage.sent, received=stage.received, kind="fetch_kv"
        )

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        return _FetchGradReturn(self, KeysAndValues.no_gradients(k, v), k.dtype)

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """What others need of the local keys and values, both ways; backward also gradients of what this rank needed.

        Counted by row and KV head.
        """
        rank, width = self.sequence.channel.rank, sizes.kv_width
        given = int(self.given.sum() - self.given[rank].sum()) * width * sizes.element_bytes
        gradient_bytes = sizes.gradient_bytes(rounded=self.sequence.rounded)
        returned = int(self.wanted.sum() - self.wanted[rank].sum()) * width * gradient_bytes
        return (Move(Volume(forward=given, backward=given + returned), self.sequence.channel, hidden=True),)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """The keys of a stage and those of the next on their way, and their gradients, found and leaving."""
        largest = max((len(stage.rows) for stage in self.stages), default=0) * self.sequence.heads.kv
        return largest * sizes.kv_width * 2 * (sizes.element_bytes + sizes.accumulation_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Stage:
    """What moves at a few distances between ranks; pairs of a row and a KV head, by row, then by head.

    rows: those that arrive, places among all ranks' rows, int64. slots: row x Hk + head of what arrives. given: the
    same of local rows that leave, those to rank 0 first. sent, received: pairs to and from each rank.
    """

    rows: Tensor
    slots: Tensor
    given: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @staticmethod
    def of(wanted: Tensor, given: Tensor, rank: int, distances: range) -> "_Stage":
        ranks = torch.arange(len(wanted))
        near = torch.tensor([*distances])
        arriving = wanted & torch.isin((rank - ranks).remainder(len(ranks)), near)[:, None, None]
        leaving = given & torch.isin((ranks - rank).remainder(len(ranks)), near)[:, None, None]
        rows = arriving.any(dim=2).flatten().nonzero().squeeze(1)
        return _Stage(
            rows=rows,
            slots=arriving.flatten(0, 1)[rows].flatten().nonzero().squeeze(1),
            given=leaving.flatten(1).nonzero()[:, 1],
            sent=tuple(leaving.flatten(1).sum(dim=1).tolist()),
            received=tuple(arriving.flatten(1).sum(dim=1).tolist()),
        )


@final
class _FetchGradReturn(GradReturn):
    def __init__(self, kv_schedule: _FetchKVSchedule, gradient: KeysAndValues, dtype: torch.dtype) -> None:
        self.kv_schedule, self.gradient, self.part = kv_schedule, gradient, 0
        self.wire_dtype = dtype if kv_schedule.sequence.rounded else gradient.buffer.dtype
        self.arriving: Transfer | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        self.part += 1
        if self.part == 1:
            if dk is not None and dv is not None:
                self.gradient.key.add_(dk)
                self.gradient.value.add_(dv)
            return
        self._take_in()
        stage = self.kv_schedule.stages[self.part - 2]
        width = self.gradient.key.shape[2] + self.gradient.value.shape[2]
        if dk is None or dv is None:
            found = self.gradient.buffer.new_zeros(len(stage.slots), width)
        else:
            slots = stage.slots.to(dk.device)
            found = torch.cat((dk.flatten(0, 1)[slots], dv.flatten(0, 1)[slots]), dim=1)
        self.arriving = self.kv_schedule.sequence.channel.start_all_to_all(
            found.to(self.wire_dtype), sent=stage.received, received=stage.sent, kind="fetch_dkv"
        )

    def _take_in(self) -> None:
        """Add what came home for the stage before; a row may come from several ranks."""
        if self.arriving is None:
            return
        arrived, stage = self.arriving.wait(), self.kv_schedule.stages[self.part - 3]
        key, value = self.gradient.key.flatten(0, 1), self.gradient.value.flatten(0, 1)
        places = stage.given.to(key.device).split(stage.sent)
        for place, part in zip(places, arrived.split(stage.sent), strict=True):
            key[place] += part[:, : key.shape[1]]
            value[place] += part[:, key.shape[1] :]
        self.arriving = None

    def finish(self) -> tuple[Tensor, Tensor]:
        self.part += 1
        self._take_in()
        return self.gradient.key, self.gradient.value


@final
class _SelectedKVExchange(KVExchange):
    """The keys to move are known once the queries have selected blocks: each rank then asks the others for them."""

    def __init__(self, sequence: _Sequence) -> None:
        self.sequence = sequence

    def for_selection(self, selection: BlockSelection | None) -> KVSchedule:
        wanted = self.sequence.wanted(selection)
        return _FetchKVSchedule(self.sequence, wanted, self.sequence.channel.all_to_all(wanted, kind="fetch_requests"))

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Besides what was chosen, a byte for every row and KV head of other ranks: whether it is needed."""
        kv_schedule = self._schedule(routing)
        requests = kv_schedule.wanted.numel() - kv_schedule.wanted[self.sequence.channel.rank].numel()
        asked = Move(Volume(forward=requests, backward=0), self.sequence.channel, hidden=False)
        return *kv_schedule.moves(sizes, routing), asked

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        return self._schedule(routing).working_bytes(sizes, routing)

    def _schedule(self, routing: RoutingSource) -> "_FetchKVSchedule":
        """Return the schedule of the keys that all ranks select; without a full selection, of all they may select."""
        found = routing()
        if not isinstance(found, SelectedBlocks) or found.one_in > 1:
            return _FetchKVSchedule(self.sequence, self.sequence.wanted(), self.sequence.given())
        rows = self.sequence.global_rows, self.sequence.mine
        of_all, of_mine = (found.selection.of_queries(of_rows) for of_rows in rows)
        return _FetchKVSchedule(self.sequence, self.sequence.wanted(of_mine), self.sequence.given(of_all))


STRATEGIES.add(Fetch.name, Fetch)
