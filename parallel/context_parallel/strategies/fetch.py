"""Fetch: a rank receives the keys and values of other ranks that its own queries require, and no others.

Windows and neighborhoods require halos, documents their rows on other ranks, block-sparse and routed mechanisms the
union of the selected blocks of each head. Keys arrive in stages, from ranks at growing distances, each stage while the
one before it is computed. Example: 8 ranks; of 7 distances, stage 1 has 1 and 2, so that rank 5 receives from 4 and 3:

    stage       0        1          2          3          4
    distance    local    1 2        3 4        5 6        7
    rank 5      5        4 3        2 1        0 7        6

Gradients return along the same routes; their owner sums them in the accumulation dtype, in the order of the ranks.

A choice by content narrows what is sent, and not what attention is planned for: memory is that of the keys that the
mask alone shows, and the host waits for nothing but how many keys each pair of ranks exchanges, once for each choice.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.kinds.routed import SelectedBlocks
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.selection import BlockPartition, BlockSelection
from farspan.kernels.planner import RoutingSource, Sizes
from farspan.parallel.comm import Transfer
from farspan.parallel.context_parallel.moving_kv import Gradients, GradReturn, KVExchange, KVMovingStrategy, KVSchedule
from farspan.parallel.context_parallel.required_keys import keys_of_blocks, required_keys
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, ShardedPlanner

STAGES = 4
"""Most stages for the keys of other ranks: more stages overlap more of the transfers, fewer make larger calls."""


@final
class Fetch(KVMovingStrategy):
    """Works under every layout; sends least where the keys of a query are on few ranks."""

    name = "fetch"

    def kv_schedule(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVSchedule:
        return _FetchKVExchange(planner, attention_mask).schedule

    def kv_exchange_of_blocks(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVExchange:
        return _FetchKVExchange(planner, attention_mask)


@final
class _FetchKVSchedule(KVSchedule):
    """Parts of KV: the local rows, then stage by stage the required rows of other ranks.

    required: of all ranks' rows, by this one; requested: of this rank's, by each; bool `[P, T, Hk]`.
    """

    def __init__(
        self, planner: ShardedPlanner, attention_mask: AttentionMask, required: Tensor, requested: Tensor
    ) -> None:
        self.required, self.requested = required, requested
        rank, degree = planner.strategy.channel.rank, len(required)
        # The distances from owner to reader, in stages.
        distances = torch.arange(1, degree).tensor_split(min(STAGES, degree - 1) or 1)
        self.routes = [_Route.of(required, rank, part) for part in distances if len(part)]
        counts = (x.sum(dim=(1, 2)).tolist() for x in (required, requested))
        self.stages = self._stages(required, requested, *counts)
        global_tokens = planner.shards.index.flatten()  # [P, T] -> [P * T]
        tokens = [planner.tokens, *(global_tokens[route.rows.host] for route in self.routes)]
        super().__init__(planner, attention_mask, tokens)

    def narrow(
        self, required: Tensor, requested: Tensor, *, received: Sequence[int], sent: Sequence[int]
    ) -> "_FetchKVSchedule":
        """Return the schedule of fewer keys: `required` and `requested` on the device, and how many of each rank."""
        narrowed = copy(self)
        narrowed.stages = self._stages(required, requested, received, sent)
        local, *others = self.plans
        arrives = [any(stage.received) for stage in narrowed.stages]
        narrowed.plans = [local, *(x if any_key else x.emptied() for x, any_key in zip(others, arrives, strict=True))]
        return narrowed

    def _stages(
        self, required: Tensor, requested: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> list["_Stage"]:
        return [route.stage(required, requested, received, sent) for route in self.routes]

    def prepare(self, device: torch.device, selection: BlockSelection | PackedSelection | None) -> KVSchedule:
        for stage in self.stages:
            stage.slots.on(device)
            stage.leaving.on(device)
        return self

    def kv_parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        transfer = self._start(0, k, v)
        yield k, v
        for number, stage in enumerate(self.stages):
            assert transfer is not None
            arrived = transfer.wait()
            transfer = self._start(number + 1, k, v)
            # Heads differ in what they require; the other heads of a row are masked, and stay 0.
            key, value = (x.new_zeros(stage.num_rows * x.shape[1], x.shape[2]) for x in (k, v))  # [rows * Hk, D]
            slots = stage.slots.on(key.device)
            key[slots], value[slots] = arrived.split((k.shape[2], v.shape[2]), dim=1)  # [pairs, D + Dv]
            # [rows * Hk, D] -> [rows, Hk, D]
            yield key.unflatten(0, (-1, k.shape[1])), value.unflatten(0, (-1, v.shape[1]))

    def _start(self, number: int, k: Tensor, v: Tensor) -> Transfer | None:
        if number >= len(self.stages):
            return None
        stage = self.stages[number]
        leaving = stage.leaving.on(k.device)
        # [T, Hk, D] -> [T * Hk, D] -> [pairs, D + Dv]
        packed = torch.cat((k.flatten(0, 1)[leaving], v.flatten(0, 1)[leaving]), dim=1)
        return self.channel.start_all_to_all(packed, sent=stage.sent, received=stage.received, kind="fetch_kv")

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        return _FetchGradReturn(self, k, v, self.stages)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Requested keys and values in both passes; backward also gradients of required ones. By row and KV head."""
        return (self.move(sizes, self.required, self.requested),)

    def move(self, sizes: Sizes, required: Tensor, requested: Tensor) -> Move:
        rank, width = self.channel.rank, sizes.kv_width
        sent = int(requested.sum() - requested[rank].sum()) * width * sizes.element_bytes
        returned = int(required.sum() - required[rank].sum()) * width * self.gradient_bytes(sizes)
        return Move(forward=sent, backward=sent + returned, channel=self.channel, overlapped=True)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """The keys of two stages, in use and arriving, and their gradients, computed and packed."""
        largest = max((stage.num_rows for stage in self.stages), default=0) * self.planner.share.local_heads.kv
        return largest * sizes.kv_width * 2 * (sizes.element_bytes + sizes.accumulation_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Stage:
    """The transfers at a few distances between ranks, as pairs of a row and a KV head, by row, then by head.

    num_rows: rows of the part of KV. slots: row x Hk + head of the pairs that arrive in it. leaving: the same of local
    pairs, those to rank 0 first. sent, received: pairs to and from each rank.
    """

    num_rows: int
    slots: DeviceCopies
    leaving: DeviceCopies
    sent: tuple[int, ...]
    received: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Route:
    """Who takes part in a stage, whatever is selected.

    owners, readers: the ranks that this one receives from and sends to, int64. rows: those that the mask shows, of all
    ranks' rows set end to end, int64.
    """

    owners: DeviceCopies
    readers: DeviceCopies
    rows: DeviceCopies

    @staticmethod
    def of(required: Tensor, rank: int, distances: Tensor) -> "_Route":
        owners, readers = ((rank + sign * distances).remainder(len(required)).sort().values for sign in (-1, 1))
        owner, row = required[owners].any(dim=2).nonzero().t()  # [owners, T, Hk] -> [owners, T] -> [rows]
        rows = owners[owner] * required.shape[1] + row
        return _Route(owners=DeviceCopies(owners), readers=DeviceCopies(readers), rows=DeviceCopies(rows))

    def stage(self, required: Tensor, requested: Tensor, received: Sequence[int], sent: Sequence[int]) -> _Stage:
        """Return a stage of required and requested keys on one device; received, sent: how many of each rank."""
        device, owners, readers = required.device, self.owners.host.tolist(), self.readers.host.tolist()
        arriving = required.flatten(0, 1)[self.rows.on(device)].flatten()  # [P * T, Hk] -> [rows * Hk]
        leaving = requested[self.readers.on(device)].flatten(1)  # [readers, T * Hk]
        return _Stage(
            num_rows=len(self.rows.host),
            slots=DeviceCopies(arriving.nonzero_static(size=sum(received[n] for n in owners))[:, 0]),
            leaving=DeviceCopies(leaving.nonzero_static(size=sum(sent[n] for n in readers))[:, 1]),
            sent=tuple(number if n in readers else 0 for n, number in enumerate(sent)),
            received=tuple(number if n in owners else 0 for n, number in enumerate(received)),
        )


@final
class _FetchGradReturn(GradReturn):
    """Each stage's gradients return to their owners while the next stage is computed."""

    is_local = True
    arriving: tuple[Transfer, _Stage] | None = None

    def __init__(self, kv_schedule: KVSchedule, k: Tensor, v: Tensor, stages: Sequence[_Stage]) -> None:
        super().__init__(kv_schedule, k, v)
        self.stages = iter(stages)

    def add(self, gradients: Gradients) -> None:
        if self.is_local:
            self.is_local = False
            self._add_local(gradients)
            return
        self.receive()
        stage = next(self.stages)
        if gradients is None:
            width = self.total.key.shape[2] + self.total.value.shape[2]
            packed = self.total.buffer.new_zeros(sum(stage.received), width)
        else:
            # [rows, Hk, D] -> [rows * Hk, D] -> [pairs, D + Dv]
            packed = torch.cat([x.flatten(0, 1)[stage.slots.on(x.device)] for x in gradients], dim=1)
        transfer = self.channel.start_all_to_all(
            packed.to(self.comm_dtype), sent=stage.received, received=stage.sent, kind="fetch_dkv"
        )
        self.arriving = transfer, stage

    def receive(self) -> None:
        if self.arriving is None:
            return
        transfer, stage = self.arriving
        arrived = transfer.wait()
        key, value = self.total.key.flatten(0, 1), self.total.value.flatten(0, 1)  # views [T * Hk, D]
        # Rank by rank: several ranks may return the gradient of a pair, and indexed addition drops duplicates.
        for rows, part in zip(stage.leaving.on(key.device).split(stage.sent), arrived.split(stage.sent), strict=True):
            key[rows] += part[:, : key.shape[1]]
            value[rows] += part[:, key.shape[1] :]
        self.arriving = None


@final
class _FetchKVExchange(KVExchange):
    """The required keys are known once the queries have selected blocks; each rank then requests them.

    schedule: of the keys that the mask shows. _narrowed: by selection, which is that of the first pass where
    activations are recomputed, and of all layers where a pattern does not depend on content.
    """

    def __init__(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> None:
        super().__init__(planner, attention_mask)
        self.schedule = _FetchKVSchedule(planner, attention_mask, self._required(), self._requested())
        self._unmasked = DeviceCopies(self.schedule.required)
        self._key_blocks: dict[BlockPartition, DeviceCopies] = {}
        self._narrowed: WeakKeyDictionary[BlockSelection | PackedSelection, KVSchedule] = WeakKeyDictionary()

    def prepare(self, device: torch.device, selection: BlockSelection | PackedSelection | None) -> KVSchedule:
        if selection is None:
            return self.schedule.prepare(device, None)
        tables = [self._unmasked, self._key_block(selection.blocks)]
        for table in (*tables, *(table for route in self.schedule.routes for table in (route.rows, route.readers))):
            table.on(device)
        # What is selected has the same plans.
        return self.schedule

    def for_selection(self, selection: BlockSelection | PackedSelection | None) -> KVSchedule:
        if selection is None:
            return self.schedule
        return once(self._narrowed, selection, lambda: self._narrow(selection))

    def _narrow(self, selection: BlockSelection | PackedSelection) -> KVSchedule:
        selected = selection.selected_blocks()
        key_block, unmasked = (x.on(selected.device) for x in (self._key_block(selection.blocks), self._unmasked))
        keys = keys_of_blocks(selected, key_block, self.planner.share.local_heads.kv)
        required = unmasked & keys.t().unflatten(0, unmasked.shape[:2])  # [Hk, P * T] -> [P, T, Hk]
        requested = self.channel.all_to_all(required, kind="fetch_requests")
        # The only time that the host waits: [2, P, T, Hk] -> [2, P]
        received, sent = torch.stack((required, requested)).sum(dim=(2, 3)).cpu().tolist()
        return self.schedule.narrow(required, requested, received=received, sent=sent)

    def _key_block(self, blocks: BlockPartition) -> DeviceCopies:
        """Return the block of each key of all ranks, int64 `[P * T]`; -1 for padding."""
        index = self.planner.shards.index.flatten()  # [P, T] -> [P * T]
        return once(self._key_blocks, blocks, lambda: DeviceCopies(blocks.of(self.planner.global_rows.take(index))))

    def _required(self, selection: BlockSelection | None = None) -> Tensor:
        """Return the keys that this rank's queries require, bool `[P, T, Hk]`."""
        tokens, index = self.planner.tokens, self.planner.shards.index
        plan = self.planner.plan_of(self.attention_mask, tokens, index.flatten(), selection)  # keys [P * T]
        keys = required_keys(plan, self.planner.share.local_heads.kv)[0]
        return keys.t().unflatten(0, index.shape)  # [Hk, P * T] -> [P, T, Hk]

    def _requested(self, selection: BlockSelection | None = None) -> Tensor:
        """Return this rank's keys that each rank requires, bool `[P, T, Hk]`; selection: of the rows set end to end."""
        tokens, index = self.planner.tokens, self.planner.shards.index
        plan = self.planner.plan_of(self.attention_mask, index.flatten(), tokens, selection)  # queries [P * T]
        keys = required_keys(plan, self.planner.share.local_heads.kv, groups=len(index))
        return keys.transpose(1, 2)  # [P, Hk, T] -> [P, T, Hk]

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """The requested keys and, for every row and KV head of other ranks, a byte: whether it is required.

        The keys that all ranks select; without a full selection, all that they may select.
        """
        requests = Move(forward=(self.channel.size - 1) * self.kv_rows, backward=0, channel=self.channel)
        found = routing()
        if not isinstance(found, SelectedBlocks) or found.one_in > 1:
            return *self.schedule.moves(sizes, routing), requests
        of_local, of_all = (
            found.selection.of_queries(tokens) for tokens in (self.planner.tokens, self.planner.shards.index.flatten())
        )
        return self.schedule.move(sizes, self._required(of_local), self._requested(of_all)), requests

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        return self.schedule.working_bytes(sizes, routing)


STRATEGIES.add(Fetch.name, Fetch)
