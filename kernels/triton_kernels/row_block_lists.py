"""Lists of gathered rows: tiles of query rows of any heads that select the same key block, where single rows select.

Made by torch on the device of the tensors, since such a selection is new in each layer. Some rows are gathered at a
time, so that the partial results, one for each row and selected block, stay bounded.

Example: 3 queries of one head, 4 key blocks, 2 rows in a query tile; 0 -> block 2, 1 -> blocks 0 and 2, 2 -> block 2.

    block 0    tile 0: row 1, -           index  1 -1  0  1  2 -1    the row of each slot
    block 2    tile 1: rows 0, 1          slots of row 0: 2; of row 1: 0, 3; of row 2: 4
               tile 2: row 2, -

Each slot receives the attention of its row to its block; `combine_kernel` then merges the slots of each row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planning.bounds import Bounds, all_unmasked, any_unmasked
from farspan.kernels.planning.gathered_batches import selects_by_tile
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.ragged import chunks_by_budget, expand, offsets_of
from farspan.kernels.triton_kernels.block_mask import COUNT_BITS, MAX_COUNT, MAX_TILES, BlockMask


def selects_by_row(plan: Plan) -> bool:
    """Whether single rows select blocks, or query blocks too small to make a tile of."""
    return plan.selection is not None and not selects_by_tile(plan, count_padding=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GatheredRows:
    """Some consecutive query rows, gathered by key block; the row of a head is numbered row * heads + head.

    rows: which. index: int32 `[tiles * query_tile]`, the row and head in each slot of each tile, -1 for none.
    of_queries: one list for each tile, `group` its KV head. of_keys: lists of query tiles, one for each KV head and key
    tile. slots: int32, the slots of each row and head, ascending by block; those of row r and head h of these rows are
    slots[slot_offsets[r * heads + h]] to slots[slot_offsets[r * heads + h + 1] - 1].
    """

    rows: slice
    index: Tensor
    of_queries: BlockMask
    of_keys: BlockMask
    slot_offsets: Tensor
    slots: Tensor

    def slots_like(self, result: Tensor) -> Tensor:
        """Return memory for the partial results `[slots, width]` of a result `[rows, heads, width]`."""
        return result.new_empty(len(self.index), result.shape[2])


def gathered_rows(
    plan: Plan, keys: Tiling, kv_heads: int, query_tile: int, max_slots: int, device: torch.device
) -> Iterator[GatheredRows]:
    """Yield all query rows, some at a time that select about `max_slots` blocks together (at least one row).

    keys: the plan's keys cut by block. Raises ValueError where some rows make more tiles than a run can name.
    """
    assert plan.selection is not None
    on_host = plan.selection.as_lists
    selection = replace(
        on_host,
        query_block=on_host.query_block.to(device),
        offsets=on_host.offsets.to(device),
        key_blocks=on_host.key_blocks.to(device),
    )
    blocks = _Blocks.of(keys, on_host.blocks.count)
    if not (blocks.stop > blocks.first).any():
        return
    share = plan.heads // on_host.heads
    # Offsets [heads * query blocks + 1] -> blocks selected by all heads, by query block -> by row (-1 selects none).
    of_query_block = on_host.offsets.diff().view(on_host.heads, -1).sum(dim=0) * share
    of_row = torch.cat((of_query_block, of_query_block.new_zeros(1)))[on_host.query_block]
    for rows in (slice(*chunk) for chunk in chunks_by_budget(of_row.numpy(), max_slots)):
        query_block = selection.query_block[rows]
        found = []
        for part in plan.parts:
            heads = torch.tensor(part.heads, device=device)
            nth, head, selected = _selected_blocks(selection, query_block, heads, share)
            queries = plan.queries.slice(rows).to(device)
            some, full = _classify(plan, part, queries.position[nth], queries.document[nth], blocks, selected)
            found.append((((nth + rows.start) * plan.heads + head)[some], selected[some], ~full[some]))
        yield _gather(plan, rows, found, blocks, kv_heads, query_tile)


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    """Key blocks: the tiles [first, stop) of each, 0, 0 if none; the block of each tile, -1 if none; the tiled keys."""

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
        present = np.flatnonzero(self.stop > self.first)
        present = present[np.argsort(self.first[present])]
        start, stop = self.first[present] * self.keys.size, self.stop[present] * self.keys.size
        rows = self.keys.rows
        found = Bounds.of(rows, start, np.minimum(stop, len(rows)), attention_mask)
        # A short tile always takes the mask, as it lacks rows.
        found.padded[stop > len(rows)] = True
        nth = np.zeros(len(self.first), dtype=np.int64)
        nth[present] = np.arange(len(present))
        return found.take(nth)


def _selected_blocks(
    selection: BlockSelection, query_block: Tensor, heads: Tensor, share: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (nth row of `query_block`, head, selected block) for each block that these heads select, int64.

    `share` neighboring heads have one list.
    """
    # [rows, heads]: the list of each row and head.
    number = heads // share * selection.num_query_blocks + query_block.clamp(min=0)[:, None]
    start, stop = (selection.offsets[number + more] if selection.num_query_blocks else number for more in (0, 1))
    # [rows, heads] -> [rows * heads]
    counts = (stop - start).masked_fill(query_block[:, None] < 0, 0).flatten()
    # One element for each selected block: its cell (row, head), and which of the cell's blocks it is.
    cell, nth = expand(counts)
    block = selection.key_blocks[start.flatten()[cell] + nth].long()
    return cell // len(heads), heads[cell % len(heads)], block


def _classify(
    plan: Plan, part: HeadPlan, position: Tensor, document: Tensor, blocks: _Blocks, selected: Tensor
) -> tuple[Tensor, Tensor]:
    """Return whether each row may attend to some keys of its selected block, and whether surely to all of them."""
    bounds = blocks.bounds(part.attention_mask).to(position.device).take(selected)
    present = torch.from_numpy(blocks.stop > blocks.first).to(position.device)[selected]
    is_token = document >= 0
    row = Bounds(
        position_low=position, position_high=position, document_low=document, document_high=document, padded=~is_token
    )
    full = all_unmasked(row, bounds, part.attention_mask)
    if part.attention_mask.neighborhood is not None or plan.lifetime is not None:
        full = torch.zeros_like(full)
    return any_unmasked(row, bounds, part.attention_mask) & is_token & present, full


def _gather(
    plan: Plan, rows: slice, found: list[tuple[Tensor, Tensor, Tensor]], blocks: _Blocks, kv_heads: int, query_tile: int
) -> GatheredRows:
    """Sort selected blocks by KV head, block and whether it is full, and cut the rows of each into tiles.

    found, by part: (row * heads + head, block, whether it is partial) of each selected block.
    """
    flat, block, partial = (torch.cat(column) for column in zip(*found, strict=True))
    count, device = len(blocks.first), flat.device
    kv_head = flat % plan.heads // (plan.heads // kv_heads)
    # A run: the rows of one KV head that select one block, fully or partly.
    runs, order = ((kv_head * count + block) * 2 + partial).sort(stable=True)
    run, sizes = runs.unique_consecutive(return_counts=True)
    tiles = (sizes + query_tile - 1) // query_tile
    first_tile = tiles.cumsum(0) - tiles
    # Rows keep their order; each run starts at a tile of its own.
    number, nth = expand(sizes)
    slot = first_tile[number] * query_tile + nth
    total = int(tiles.sum())
    if total > MAX_TILES:
        raise ValueError(f"{len(flat)} selected blocks make {total} tiles of {query_tile} rows: take larger blocks")
    index = torch.full((total * query_tile,), -1, dtype=torch.int32, device=device)
    index[slot] = flat[order].int()
    # The transpose, row -> slots, as CSR; the sort is stable, so the slots of a row ascend.
    num_cells = (rows.stop - rows.start) * plan.heads
    cell = flat[order] - rows.start * plan.heads
    by_cell = cell.argsort(stable=True)
    return GatheredRows(
        rows=rows,
        index=index,
        of_queries=_of_queries(run.repeat_interleave(tiles), blocks, count),
        of_keys=_of_keys(run, first_tile, tiles, blocks, kv_heads),
        slot_offsets=offsets_of(torch.bincount(cell, minlength=num_cells)).int(),
        slots=slot[by_cell].int(),
    )


def _of_queries(run: Tensor, blocks: _Blocks, count: int) -> BlockMask:
    """Return one list for each query tile: the key tiles of its block, all full or all partial."""
    device = run.device
    block = run // 2 % count
    first, stop = (torch.from_numpy(x).to(device)[block] for x in (blocks.first, blocks.stop))
    # [tiles, 2]: full, partial
    visits = torch.zeros(len(run), 2, dtype=torch.int64, device=device)
    visits[torch.arange(len(run), device=device), run % 2] = stop - first
    # [tiles] -> [tiles, 2] -> [tiles * 2]
    return _lists(first[:, None].expand(-1, 2).flatten(), visits.flatten(), len(run), run // 2 // count)


def _of_keys(run: Tensor, first: Tensor, tiles: Tensor, blocks: _Blocks, kv_heads: int) -> BlockMask:
    """Return one list for each KV head and key tile: the query tiles that select its block."""
    device, count = run.device, len(blocks.first)
    # [first or count, KV heads, blocks + 1, full or partial]; the last block, number -1, is that of tiles without one.
    table = torch.zeros(2, kv_heads, count + 1, 2, dtype=torch.int64, device=device)
    column = run // 2 // count, run // 2 % count, run % 2
    table[0][column], table[1][column] = first, tiles
    # [2, KV heads, blocks + 1, 2] -> [2, KV heads, key tiles, 2] -> [2, KV heads * key tiles * 2]
    table = table[:, :, torch.from_numpy(blocks.tile_block).to(device)].reshape(2, -1)
    return _lists(table[0], table[1], len(blocks.tile_block), torch.arange(kv_heads, device=device))


def _lists(first: Tensor, counts: Tensor, tiles: int, group: Tensor) -> BlockMask:
    """Return lists of one run in each half, cut where it is longer than MAX_COUNT."""
    cuts = (counts + MAX_COUNT - 1) // MAX_COUNT
    number, nth = expand(cuts)
    start = first[number] + nth * MAX_COUNT
    length = (counts[number] - nth * MAX_COUNT).clamp(max=MAX_COUNT)
    runs = torch.cat((start << COUNT_BITS | length, start.new_zeros(1)))
    # [groups * tiles * 2] -> [groups, tiles, 2] -> [tiles]
    visits = counts.view(-1, tiles, 2).sum(dim=(0, 2)) if tiles else counts
    return BlockMask(
        offsets=offsets_of(cuts).int(),
        counts=counts.int(),
        runs=runs.int(),
        order=visits.argsort(descending=True, stable=True).int(),
        group=group.int(),
    )
