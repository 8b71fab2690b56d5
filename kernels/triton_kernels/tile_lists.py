# pyright: reportMissingImports=false
"""Block masks on a device: those of a mask alone are copied there once; selections and lifetimes narrow them there.

Nothing waits for the device: where the runs of a narrowed list go follows from the lists of the mask, which the host
knows. Example: lists of 2 and 3 visits by the mask, for each of 2 groups; those that remain are marked by x.

    group 0, tile 0    start 0    x -          group 1, tile 0    start 5    - -
    group 0, tile 1    start 2    x x -        group 1, tile 1    start 7    x x x

Memory is that of the lists by the mask for every group, 4 bytes for each visit, and at most LIST_BYTES: the tiles of
longer ones are taken some at a time, a MOST_PORTIONS-th of them at least.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.ragged import chunks_by_budget
from farspan.kernels.triton_kernels.block_mask import BlockMask, TiledPlan, query_bounds, tile_plan
from farspan.kernels.triton_kernels.narrowing import Alive, Portion, Selected, narrow_kernel

LIST_BYTES = 1 << 29
"""Runs of narrowed lists that exist at the same time, unless a single tile has more."""
MOST_PORTIONS = 8
"""Portions of all lists, about, as long as their places fit into 32 bits: each takes two launches."""
CHUNK = 128
"""Tiles that a program of one warp tests at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tiles:
    """Tiles of a plan's rows on a device, and their lists by the mask alone.

    q_index, k_index: int32 `[tiles * size]`, the rows in query and key tiles, None if in order. on_host: the same
    there, where its block mask is planned.
    """

    q_index: Tensor | None
    k_index: Tensor | None
    lists: BlockMask
    on_host: TiledPlan
    stationary: Literal["queries", "keys"]

    @staticmethod
    def of(
        plan: Plan, query_tile: int, key_tile: int, stationary: Literal["queries", "keys"], device: torch.device
    ) -> "Tiles":
        """Cut the rows into tiles, those of a selection by its blocks; made once for all layers of a sequence."""

        def make() -> Tiles:
            on_host = tile_plan(plan, query_tile, key_tile, stationary)
            index = (None if x.index is None else copy_to(torch.from_numpy(x.index), device) for x in on_host[:2])
            q_index, k_index = index
            return Tiles(
                q_index=q_index,
                k_index=k_index,
                lists=on_host.lists.to(device),
                on_host=on_host,
                stationary=stationary,
            )

        return once(plan.shared, ("tiles", query_tile, key_tile, stationary, device, *blocks_of(plan)), make)

    @property
    def count(self) -> int:
        """Stationary tiles: each has a list in every group."""
        return len(self.on_host.lists.order)

    def prepare(self, plan: Plan) -> None:
        """Make what `block_masks` needs of a plan but for its selection or lifetimes."""
        if plan.selection is not None:
            self._portions(plan, plan.selection.heads)
            self._blocks(plan)
        if plan.lifetime is not None:
            self._portions(plan, len(plan.lifetime))
            self._positions(plan)

    def block_masks(self, plan: Plan) -> Iterator[BlockMask]:
        """Yield the block mask of a plan with these tiles, of some of the stationary tiles at a time if it is large."""
        device = self.lists.order.device
        if plan.selection is None and plan.lifetime is None:
            yield self.lists
            return
        if plan.lifetime is None:
            selection = packed(plan, device)
            heads, selected, alive = selection.heads, self._selected(plan, selection), None
        else:
            heads, selected, alive = len(plan.lifetime), None, self._alive(plan, plan.lifetime)
        group, portions = self._portions(plan, heads)
        for portion, size in portions:
            groups = len(portion.part)
            offsets, counts = (group.new_empty(2 * groups * self.count) for _ in range(2))
            # One more, so that a kernel may read one ahead.
            runs = group.new_empty(size + 1)
            kernel: Any = narrow_kernel
            kernel[(groups * portion.tiles,)](
                self.lists, portion, selected, alive, offsets, counts, runs, self.count,
                BY_QUERIES=self.stationary == "queries", CHUNK=CHUNK, num_warps=1,
            )  # fmt: skip
            yield BlockMask(offsets=offsets, counts=counts, runs=runs, order=portion.order, group=group)

    def _portions(self, plan: Plan, heads: int) -> tuple[Tensor, list[tuple[Portion, int]]]:
        """Return the group of each query head, int32 `[heads]`, and the portions, each with the size of its runs.

        heads: of the selection, or KV heads, by which the lists of query heads differ.
        """
        return once(plan.shared, ("portions", self, heads), lambda: self._cut(plan, heads))

    def _cut(self, plan: Plan, heads: int) -> tuple[Tensor, list[tuple[Portion, int]]]:
        lists, device = self.on_host.lists, self.lists.order.device
        source = np.arange(plan.heads) * heads // plan.heads
        # [query heads, (part, source)] -> those of each group
        pairs, group = np.unique(np.stack((lists.group.numpy(), source), axis=1), axis=0, return_inverse=True)
        part, source = (torch.from_numpy(column).int() for column in pairs.T)
        # [parts * tiles * 2] -> [parts, tiles, 2] -> [groups, tiles]
        sizes = lists.counts.view(-1, self.count, 2).sum(dim=2)[part.long()]
        portions, costs = [], 4 * sizes.sum(dim=0)[lists.order.long()].numpy()
        budget = max(LIST_BYTES, min(int(costs.sum()) // MOST_PORTIONS, 4 * torch.iinfo(torch.int32).max))
        for start, stop in chunks_by_budget(costs, budget):
            order = lists.order[start:stop]
            ends = sizes[:, order.long()].flatten().cumsum(0)
            starts = (ends - sizes[:, order.long()].flatten()).int()
            order, starts, *groups = (copy_to(x, device) for x in (order, starts, part, source))
            portions.append((Portion(order, starts, groups[0], groups[1], len(order)), int(ends[-1])))
        return copy_to(torch.from_numpy(group.reshape(-1)).int(), device), portions

    def _selected(self, plan: Plan, selection: PackedSelection) -> Selected:
        bits = selection.bits.contiguous()
        return Selected(bits, *self._blocks(plan), selection.heads, bits.shape[2])

    def _blocks(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """The query block of each query tile and the key block of each key tile, int32, -1 for none."""

        def block_of_tiles(tiling: Tiling) -> Tensor:
            assert tiling.number is not None
            return copy_to(torch.from_numpy(tiling.number).int(), self.lists.order.device)

        of = self.on_host
        return once(plan.shared, ("blocks", self), lambda: (block_of_tiles(of.queries), block_of_tiles(of.keys)))

    def _alive(self, plan: Plan, lifetime: Tensor) -> Alive:
        keys = self.on_host.keys
        if absent := len(keys) * keys.size - lifetime.shape[1]:
            # What the last tile lacks lives for no query.
            lifetime = torch.nn.functional.pad(lifetime, (0, absent), value=-1)
        # [Hk, S] -> [Hk, key tiles, tile] -> [Hk, key tiles]
        low, high = lifetime.unflatten(1, (len(keys), keys.size)).aminmax(dim=2)
        return Alive(low, high, *self._positions(plan), len(keys))

    def _positions(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """The lowest and the highest position of the queries of each tile, int64."""

        def positions() -> tuple[Tensor, Tensor]:
            bounds = query_bounds(self.on_host.queries, plan.attention_mask)
            low, high = (torch.from_numpy(x).contiguous() for x in (bounds.position_low, bounds.position_high))
            return copy_to(low, self.lists.order.device), copy_to(high, self.lists.order.device)

        return once(plan.shared, ("positions", self), positions)


def blocks_of(plan: Plan) -> tuple[Hashable, ...]:
    """Return what of a selection is known before it is made, for keys of a cache."""
    return () if plan.selection is None else (plan.selection.query_block, plan.selection.blocks)


def packed(plan: Plan, device: torch.device) -> PackedSelection:
    """Return a plan's selection as bits on a device, where it is unless a test gave lists."""
    selection = plan.selection
    if isinstance(selection, PackedSelection):
        return selection
    assert selection is not None
    return once(plan.cache, ("packed", device), lambda: PackedSelection.pack(selection, device))
