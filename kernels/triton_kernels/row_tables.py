"""Static tables of attention where single rows select blocks: what of a part of the keys rows and mask alone decide.

Example: 8 queries in two chunks of 4, causal, and the keys 0, 1, 2, 6 and 7 of a document in blocks of 3 keys, cut into
tiles of 2 rows. Keys have ranks, by document and position.

    block  tiles   ranks           chunk   blocks to visit
    0      0, 1    0 to 2          0       the first
    2      2       3 to 4          1       the first two

Block 1 has no key in this part, so that nobody walks its list, and block 2 lies behind all queries of chunk 0.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.selection import BlockPartition
from farspan.kernels.planning.gathered_batches import selects_by_tile
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.triton_kernels.mask_terms import MaskTerms, mask_terms

NEVER = np.iinfo(np.int32).max
"""Above every rank."""
LACKS_ROWS = -1
"""The lowest rank of what a query never attends to in full: rows are missing, so that the mask has to hide them."""


def selects_by_row(plan: Plan) -> bool:
    """Whether single rows select blocks, or query blocks too small to make a tile of."""
    if plan.selection is None:
        return False
    return plan.drawn_from is not None or not selects_by_tile(plan, count_padding=False)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowTables:
    """Keys cut by block into tiles of one size, int32 on the CPU.

    k_index: `[tiles * size]`, the key at each place, -1 for none; None where keys are in order.
    blocks: `[blocks with keys, 5]`: number, first tile, last tile + 1, lowest and highest rank; by lowest rank.
    visits: `[chunks, 2]`, the first of these blocks that some query of a chunk may attend to, and the last + 1.
    tiles: `[tiles, 3]`: block, -1 for none, lowest and highest rank.
    The lowest rank is LACKS_ROWS where a tile is not full of keys.
    """

    k_index: Tensor | None
    blocks: Tensor
    visits: Tensor
    tiles: Tensor

    @staticmethod
    def of(plan: Plan, blocks: BlockPartition, size: int, terms: MaskTerms, chunk_rows: int) -> "RowTables":
        """Return the tables of a plan's rows, queries in chunks of `chunk_rows`; terms: its mask, on the CPU."""
        k_rank, block_of_key = terms.k_rank.numpy().astype(np.int64), blocks.of(plan.keys)
        tiling = Tiling.of(plan.keys, size, block_of_key)
        assert tiling.number is not None
        first, stop = tiling.of_number(blocks.count)
        low, high, keys = _ranks(k_rank, block_of_key.numpy(), blocks.count)
        present = np.flatnonzero(keys)
        present = present[np.argsort(low[present], kind="stable")]
        visits = _visits(terms, low[present], high[present], chunk_rows)
        low[keys < (stop - first) * size] = LACKS_ROWS
        # [tiles * size] or [keys]: the key at each place, and its tile.
        key = np.arange(len(k_rank)) if tiling.index is None else tiling.index
        tile = np.where((key < 0) | (block_of_key.numpy()[key] < 0), -1, np.arange(len(key)) // size)
        tile_low, tile_high, keys = _ranks(k_rank[key], tile, len(tiling))
        tile_low[keys < size] = LACKS_ROWS
        return RowTables(
            k_index=None if tiling.index is None else torch.from_numpy(tiling.index),
            blocks=_table(present, first[present], stop[present], low[present], high[present]),
            visits=visits,
            tiles=_table(tiling.number, tile_low, tile_high),
        )

    def to(self, device: torch.device) -> "RowTables":
        k_index = None if self.k_index is None else copy_to(self.k_index, device)
        blocks, visits, tiles = (copy_to(x, device) for x in (self.blocks, self.visits, self.tiles))
        return RowTables(k_index=k_index, blocks=blocks, visits=visits, tiles=tiles)


def static_terms(plan: Plan) -> MaskTerms:
    """Return the mask of a plan without its selection, on the CPU: lists have no row that is in no query block."""
    return mask_terms(replace(plan, selection=None), torch.device("cpu"))


def _ranks(rank: np.ndarray, group: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lowest rank of each of `count` groups, the highest, and the number of rows; group -1 is none."""
    rank, group = rank[group >= 0], group[group >= 0]
    low, high = np.full(count, NEVER, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    np.minimum.at(low, group, rank)
    np.maximum.at(high, group, rank)
    return low, high, np.bincount(group, minlength=count)


def _visits(terms: MaskTerms, low: np.ndarray, high: np.ndarray, chunk_rows: int) -> Tensor:
    """Return `RowTables.visits` for the lowest and highest ranks of blocks, ascending by the lowest."""
    first, last = terms.q_first.numpy(), terms.q_last.numpy()  # [windows, T]
    if terms.q_first_sink is not None and terms.q_last_sink is not None:
        first = np.concatenate((first, terms.q_first_sink.numpy()[None]))
        last = np.concatenate((last, terms.q_last_sink.numpy()[None]))
    # Where a query attends to nothing, it must not widen its chunk.
    first, last = np.where(last < 0, NEVER, first).min(axis=0), last.max(axis=0)
    if not first.size:
        return torch.zeros(0, 2, dtype=torch.int32)
    chunks = np.arange(0, first.size, chunk_rows)
    # Highs need not ascend where blocks interleave: the first block whose high, or that of one before, is reached.
    begin = np.searchsorted(np.maximum.accumulate(high), np.minimum.reduceat(first, chunks), side="left")
    end = np.searchsorted(low, np.maximum.reduceat(last, chunks), side="right")
    return _table(begin, np.maximum(end, begin))


def _table(*columns: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(columns, axis=1).astype(np.int32))
