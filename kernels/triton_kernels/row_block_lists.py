"""Gathered lists: tiles of query rows of any heads that chose the same block of keys, for selections by single rows.

Made by torch on the device of the tensors, since such a choice is made anew in each layer. Rows are taken in portions,
so that the partial results, one for each row and block it chose, stay bounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planning.bounds import Bounds, all_see, may_see
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.triton_kernels.block_mask import COUNT_BITS, MAX_COUNT, MAX_TILES, BlockMask


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Portion:
    """Some consecutive query rows, gathered; a row of a head is counted as row * heads + head.

    rows: which. index: int32 `[tiles * query_tile]`, the row and head at each place (slot) of each tile, -1 where
    there is none. of_queries: one list for each tile, `group` its KV head. of_keys: lists of query tiles, one for each
    KV head and key tile. slots: int32, the slots of each row and head, ascending by block; those of row r and head h of
    the portion are slots[slot_offsets[r * heads + h]] to slots[slot_offsets[r * heads + h + 1] - 1].
    """

    rows: slice
    index: Tensor
    of_queries: BlockMask
    of_keys: BlockMask
    slot_offsets: Tensor
    slots: Tensor


def portions(
    plan: Plan, keys: Tiling, kv_heads: int, query_tile: int, max_slots: int, device: torch.device
) -> Iterator[Portion]:
    """Yield portions that hold each visible pair of a plan once, of about `max_slots` choices (at least one row) each.

    keys: the plan's keys cut by block. Raises ValueError where a portion has more tiles than an entry can name.
    """
    assert plan.selection is not None
    chosen = plan.selection
    selection = replace(
        chosen, unit=chosen.unit.to(device), offsets=chosen.offsets.to(device), chosen=chosen.chosen.to(device)
    )
    blocks = _Blocks.of(keys, chosen.blocks.count)
    if not (blocks.stop > blocks.first).any():
        return
    for rows in _cut(chosen, plan.heads // chosen.heads, max_slots):
        unit = selection.unit[rows]
        flat, block, partial = [], [], []
        for part in plan.parts:
            heads = torch.tensor(part.heads, device=device)
            rank, number, chose = _choices(selection, unit, heads, plan.heads // selection.heads)
            queries = plan.queries.slice(rows).to(device)
            may, whole = _sort_out(plan, part, queries.position[rank], queries.document[rank], blocks, chose)
            flat.append(((rank + rows.start) * plan.heads + number)[may])
            block.append(chose[may])
            partial.append(~whole[may])
        yield _portion(plan, rows, torch.cat(flat), torch.cat(block), torch.cat(partial), blocks, kv_heads, query_tile)


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """Blocks of keys: tiles [first, stop) of each, none if 0, 0; of each tile its block, -1 for none; keys as tiled."""

    first: np.ndarray
    stop: np.ndarray
    tile_block: np.ndarray
    keys: Tiling

    @staticmethod
    def of(keys: Tiling, count: int) -> "_Blocks":
        assert keys.number is not None
        return _Blocks(*keys.of_number(count), keys.number, keys)

    def bounds(self, attention_mask: AttentionMask) -> Bounds:
        """Return the bounds of all blocks; those of absent ones mean nothing."""
        here = np.flatnonzero(self.stop > self.first)
        here = here[np.argsort(self.first[here])]
        start, stop = self.first[here] * self.keys.size, self.stop[here] * self.keys.size
        rows = self.keys.rows
        found = Bounds.of(rows, start, np.minimum(stop, len(rows)), attention_mask)
        # A short tile is not seen in full.
        found.padded[stop > len(rows)] = True
        place = np.zeros(len(self.first), dtype=np.int64)
        place[here] = np.arange(len(here))
        return found.take(place)


def _cut(selection: BlockSelection, share: int, max_slots: int) -> Iterator[slice]:
    """Yield stretches of rows that together chose about `max_slots` blocks; at least one row each."""
    of_unit = selection.offsets.diff().view(selection.heads, -1).sum(dim=0) * share
    of_row = torch.cat((of_unit, of_unit.new_zeros(1)))[selection.unit]
    ends, start = of_row.cumsum(0).numpy(), 0
    while start < len(ends):
        limit = (ends[start - 1] if start else 0) + max_slots
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield slice(start, stop)
        start = stop


def _choices(selection: BlockSelection, unit: Tensor, heads: Tensor, share: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each choice of these heads the rank of the row in `unit`, the head and the block, int64.

    `share` neighboring heads have one list.
    """
    number = heads // share * selection.num_units + unit.clamp(min=0)[:, None]
    start, stop = (selection.offsets[number + more] if selection.num_units else number for more in (0, 1))
    counts = (stop - start).masked_fill(unit[:, None] < 0, 0).flatten()
    cell = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    nth = torch.arange(len(cell), device=counts.device) - (counts.cumsum(0) - counts)[cell]
    block = selection.chosen[start.flatten()[cell] + nth].long()
    return cell // len(heads), heads[cell % len(heads)], block


def _sort_out(
    plan: Plan, part: HeadPlan, position: Tensor, document: Tensor, blocks: _Blocks, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Return whether each row may see some of the block it chose, and whether it surely sees all of it."""
    bounds = blocks.bounds(part.attention_mask).to(position.device).take(chosen)
    present = torch.from_numpy(blocks.stop > blocks.first).to(position.device)[chosen]
    real = document >= 0
    row = Bounds(
        position_low=position, position_high=position, document_low=document, document_high=document, padded=~real
    )
    whole = all_see(row, bounds, part.attention_mask)
    if part.attention_mask.neighborhood is not None or plan.lifetime is not None:
        whole = torch.zeros_like(whole)
    return may_see(row, bounds, part.attention_mask) & real & present, whole


def _portion(
    plan: Plan,
    rows: slice,
    flat: Tensor,
    block: Tensor,
    partial: Tensor,
    blocks: _Blocks,
    kv_heads: int,
    query_tile: int,
) -> Portion:
    """Sort choices by KV head, block and whether the block is seen in full, and cut each stretch into tiles."""
    count, device = len(blocks.first), flat.device
    kv_head = flat % plan.heads // (plan.heads // kv_heads)
    order = ((kv_head * count + block) * 2 + partial).argsort(stable=True)
    segment, sizes = ((kv_head * count + block) * 2 + partial)[order].unique_consecutive(return_counts=True)
    tiles = (sizes + query_tile - 1) // query_tile
    first_tile = tiles.cumsum(0) - tiles
    slot = torch.arange(len(flat), device=device)
    slot += (first_tile * query_tile - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
    total = int(tiles.sum())
    if total > MAX_TILES:
        raise ValueError(f"{len(flat)} choices make {total} tiles of {query_tile} rows: take larger blocks")
    index = torch.full((total * query_tile,), -1, dtype=torch.int32, device=device)
    index[slot] = flat[order].int()
    here = (rows.stop - rows.start) * plan.heads
    counts = torch.zeros(here + 1, dtype=torch.int64, device=device)
    mine = flat[order] - rows.start * plan.heads
    by_row = mine.argsort(stable=True)
    counts[1:] = torch.bincount(mine, minlength=here)
    return Portion(
        rows=rows,
        index=index,
        of_queries=_of_queries(segment.repeat_interleave(tiles), blocks, count),
        of_keys=_of_keys(segment, first_tile, tiles, blocks, kv_heads),
        slot_offsets=counts.cumsum(0).int(),
        slots=slot[by_row].int(),
    )


def _of_queries(segment: Tensor, blocks: _Blocks, count: int) -> BlockMask:
    """Return one list for each query tile: the key tiles of its block, all full or all partial."""
    device = segment.device
    block = segment // 2 % count
    first, stop = (torch.from_numpy(x).to(device)[block] for x in (blocks.first, blocks.stop))
    seen = torch.zeros(len(segment), 2, dtype=torch.int64, device=device)
    seen[torch.arange(len(segment), device=device), segment % 2] = stop - first
    return _lists(first[:, None].expand(-1, 2).flatten(), seen.flatten(), len(segment), segment // 2 // count)


def _of_keys(segment: Tensor, first: Tensor, tiles: Tensor, blocks: _Blocks, kv_heads: int) -> BlockMask:
    """Return one list for each KV head and key tile: the query tiles that chose its block."""
    device, count = segment.device, len(blocks.first)
    table = torch.zeros(2, kv_heads, count + 1, 2, dtype=torch.int64, device=device)
    # The last block is that of tiles without one: nobody chose it.
    column = segment // 2 // count, segment // 2 % count, segment % 2
    table[0][column], table[1][column] = first, tiles
    table = table[:, :, torch.from_numpy(blocks.tile_block).to(device)].reshape(2, -1)
    return _lists(table[0], table[1], len(blocks.tile_block), torch.arange(kv_heads, device=device))


def _lists(first: Tensor, visits: Tensor, tiles: int, group: Tensor) -> BlockMask:
    """Return lists of one interval each, cut where an entry could not say its length."""
    pieces = (visits + MAX_COUNT - 1) // MAX_COUNT
    offsets = torch.cat((pieces.new_zeros(1), pieces.cumsum(0)))
    nth = torch.arange(int(offsets[-1]), device=first.device) - offsets[:-1].repeat_interleave(pieces)
    start = first.repeat_interleave(pieces) + nth * MAX_COUNT
    length = (visits.repeat_interleave(pieces) - nth * MAX_COUNT).clamp(max=MAX_COUNT)
    entries = torch.cat((start << COUNT_BITS | length, start.new_zeros(1)))
    work = visits.view(-1, tiles, 2).sum(dim=(0, 2)) if tiles else visits
    return BlockMask(
        offsets=offsets.int(),
        visits=visits.int(),
        entries=entries.int(),
        order=work.argsort(descending=True, stable=True).int(),
        group=group.int(),
    )
