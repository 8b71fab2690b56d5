"""Block mask: for each tile of rows the tiles of the other side to visit, found from bounds of tiles alone.

A visit is full where all queries of the tile that are not padding attend to all keys of the other tile, and partial
where only the mask of single rows decides. Lists are CSR, and tiles that follow each other are one run in one int32: a
list of dense attention is a few runs, and scattered blocks take 4 bytes each.

Example: 12 tokens, causal, 3 query tiles of 4 rows and 4 key tiles of 3 rows; F is full, p is partial.

    key tile        0  1  2  3      full: runs (first, count)    partial: runs
    query tile 0    p  p  .  .      none                         (0, 2)
    query tile 1    F  p  p  .      (0, 1)                       (1, 2)
    query tile 2    F  F  F  p      (0, 3)                       (3, 1)

    runs     (0, 2) (0, 1) (1, 2) (0, 3) (3, 1)    full before partial, query tile by query tile; as first << 12 | count
    offsets  0 0 1 2 3 4 5                         where each half of a list starts in `runs`
    counts   0 2 1 2 3 1                           how many tiles each half visits
    order    2 1 0                                 the longest list starts first
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.device_copies import copy_to
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planning.bounds import Bounds, all_unmasked, any_unmasked, candidate_pairs
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.ragged import ranges

COUNT_BITS = 12
"""Low bits of a run: the number of its tiles. The others: its first tile."""
MAX_COUNT = (1 << COUNT_BITS) - 1
MAX_TILES = (1 << (31 - COUNT_BITS)) - 1
COARSE = 16
"""Tiles, on either side, that are tested together before they are tested one by one."""
PAIRS_AT_ONCE = 1 << 17
"""Pairs of tiles that are tested in one go: bounds memory, and is enough for NumPy."""


class BlockMask(NamedTuple):
    """Lists of tiles to visit, an argument of kernels as it is; list number = group * tiles + tile.

    offsets: int32 `[2 * lists]` or one more, where the runs of list l start: full ones at 2 l, partial ones at 2 l + 1.
    counts: int32 `[2 * lists]`, the number of tiles in them. runs: int32, first tile << COUNT_BITS | tiles; one more
    than there are, so that a kernel may read one ahead. order: int32, the tiles in the order in which kernels take
    them: those with most visits first, so that no long one is left for the end. group: int32 `[heads]`, the group whose
    lists each query head follows.
    """

    offsets: Tensor
    counts: Tensor
    runs: Tensor
    order: Tensor
    group: Tensor

    def to(self, device: torch.device) -> "BlockMask":
        return BlockMask(*(copy_to(column, device) for column in self))


class TiledPlan(NamedTuple):
    """Tiles of query rows and of key rows, and the lists of those on the stationary side: queries or keys."""

    queries: Tiling
    keys: Tiling
    lists: BlockMask


def tile_plan(plan: Plan, query_tile: int, key_tile: int, stationary: Literal["queries", "keys"]) -> TiledPlan:
    """Return tiles of a number of rows and their lists, by the mask alone; `lists_on_device` narrows them by content.

    No tile has rows of two blocks of a selection. stationary: the side whose tiles own a list, of tiles of the other
    side; each part of the plan is a group. Raises ValueError for too many tiles.
    """
    # Rows are sorted by block where they are not yet, so that no tile mixes rows of two lists.
    selection = plan.selection
    queries = Tiling.of(plan.queries, query_tile, None if selection is None else selection.query_block)
    keys = Tiling.of(plan.keys, key_tile, None if selection is None else selection.blocks.of(plan.keys))
    if max(len(queries), len(keys)) > MAX_TILES:
        raise ValueError(
            f"{len(plan.queries)} queries and {len(plan.keys)} keys make more than {MAX_TILES} tiles of "
            f"{query_tile} x {key_tile}: split the sequence over more ranks"
        )
    rows, columns = (queries, keys) if stationary == "queries" else (keys, queries)
    group = np.zeros(plan.heads, dtype=np.int32)
    found = []
    for number, part in enumerate(plan.parts):
        group[list(part.heads)] = number
        pairs = _pairs(part.attention_mask, queries, keys)
        if stationary == "keys":
            pairs = (_Pairs(x.columns, x.rows, x.partial, x.width) for x in pairs)
        found.append(_encode(pairs, len(rows), len(columns)))
    return TiledPlan(queries, keys, _join(found, group, len(rows)))


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Squares of `width` x `width` tiles, each row tile visiting each column tile in the same way."""

    rows: np.ndarray
    columns: np.ndarray
    partial: np.ndarray
    width: int


def _pairs(attention_mask: AttentionMask, queries: Tiling, keys: Tiling) -> Iterator[_Pairs]:
    """Yield the visits of query tiles (rows) to key tiles (columns) under a mask of one window, each once."""
    # Two levels: squares of COARSE x COARSE tiles first, so that time follows the border of the mask and not its area.
    fine, coarse = ((query_bounds(queries, attention_mask, n), keys.bounds(attention_mask, n)) for n in (1, COARSE))
    for i, j in candidate_pairs(*coarse, attention_mask):
        full = all_unmasked(coarse[0].take(i), coarse[1].take(j), attention_mask)
        yield _Pairs(i[full], j[full], np.zeros(int(full.sum()), dtype=bool), COARSE)
        rest = np.flatnonzero(~full)
        for start in range(0, len(rest), PAIRS_AT_ONCE // COARSE**2):
            some = rest[start : start + PAIRS_AT_ONCE // COARSE**2]
            # Squares [n] -> their tiles [n, COARSE, COARSE] -> [n * COARSE^2]
            rows = (i[some, None, None] * COARSE + np.arange(COARSE)[:, None]).repeat(COARSE, axis=2).reshape(-1)
            columns = (j[some, None, None] * COARSE + np.arange(COARSE)).repeat(COARSE, axis=1).reshape(-1)
            inside = (rows < len(queries)) & (columns < len(keys))
            yield _classify(rows[inside], columns[inside], *fine, attention_mask)


def query_bounds(queries: Tiling, attention_mask: AttentionMask, tiles: int = 1) -> Bounds:
    """Return the bounds of groups of query tiles, none of them padded.

    A full visit may compute anything for padding among the queries: kernels store 0 for such rows.
    """
    bounds = queries.bounds(attention_mask, tiles)
    return replace(bounds, padded=np.zeros_like(bounds.padded))


def _classify(i: np.ndarray, j: np.ndarray, queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> _Pairs:
    """Drop the pairs of tiles without any unmasked pair of rows, and mark those with masked ones as partial."""
    of_queries, of_keys = queries.take(i), keys.take(j)
    some = any_unmasked(of_queries, of_keys, attention_mask)
    full = all_unmasked(of_queries, of_keys, attention_mask)
    return _Pairs(i[some].astype(np.int32), j[some].astype(np.int32), ~full[some], 1)


def _encode(pairs: Iterator[_Pairs], rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of runs `[2 * rows]`, of visits `[2 * rows]`, and the runs of one group."""
    keys: list[np.ndarray] = []
    for found in pairs:
        if found.width == 1:
            keys.append(_sort_key(found.rows, found.columns, 1, found.partial))
        elif len(found.rows):
            keys.append(_square_runs(found, rows, columns))
    key = _concatenate(keys, np.int64)
    key.sort()
    num_runs, counts = np.zeros(2 * rows, dtype=np.int64), np.zeros(2 * rows, dtype=np.int32)
    runs, start = [], 0
    while start < len(key):
        # Some complete lists at a time: the temporaries are many times as large as the runs.
        stop = min(start + PAIRS_AT_ONCE, len(key)) - 1
        stop = int(np.searchsorted(key, ((key[stop] >> 31) + 1) << 31))
        number, length, run = _merge_runs(key[start:stop])
        num_runs += np.bincount(number, minlength=2 * rows)
        counts += np.bincount(number, weights=length, minlength=2 * rows).astype(np.int32)
        runs.append(run)
        start = stop
    return num_runs, counts, _concatenate(runs, np.int32)


def _merge_runs(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join runs that follow each other, cut those longer than MAX_COUNT; return half list, length, run of each."""
    first, length = key >> COUNT_BITS, key & MAX_COUNT
    starts = np.flatnonzero(np.append(True, first[1:] != first[:-1] + length[:-1]))
    first, length = first[starts], np.add.reduceat(length, starts)
    cuts = -(-length // MAX_COUNT)
    nth = ranges(np.zeros_like(cuts), cuts)
    first, length = first.repeat(cuts) + nth * MAX_COUNT, length.repeat(cuts) - nth * MAX_COUNT
    length = np.minimum(length, MAX_COUNT)
    return first >> (31 - COUNT_BITS), length, ((first & MAX_TILES) << COUNT_BITS | length).astype(np.int32)


def _sort_key(row: np.ndarray, first: np.ndarray, count: np.ndarray | int, partial: np.ndarray) -> np.ndarray:
    """Return one int64 for each run, by which runs are sorted: half list above 31 bits of run."""
    run = first.astype(np.int64) << COUNT_BITS | count
    return (row.astype(np.int64) * 2 + partial) << 31 | run


def _square_runs(found: _Pairs, rows: int, columns: int) -> np.ndarray:
    """Return the runs of squares of full visits: joined along the columns, then once for each row tile."""
    order = np.lexsort((found.columns, found.rows))
    row, column = found.rows[order], found.columns[order]
    breaks = np.append(True, (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1))
    # No run is longer than MAX_COUNT tiles.
    nth = np.arange(len(row)) - np.maximum.accumulate(np.where(breaks, np.arange(len(row)), 0))
    starts = np.flatnonzero(breaks | (nth % (MAX_COUNT // found.width) == 0))
    length = np.diff(np.append(starts, len(row)))
    first = column[starts] * found.width
    count = np.minimum(first + length * found.width, columns) - first
    # [runs, width]: the row tiles of each run; squares at the end may reach beyond the last tile.
    tile = row[starts, None] * found.width + np.arange(found.width)
    inside = tile < rows
    # [runs] -> [runs, width] -> [row tiles inside]
    first, count = (np.broadcast_to(x[:, None], tile.shape)[inside] for x in (first, count))
    return _sort_key(tile[inside], first, count, np.zeros(int(inside.sum()), dtype=bool))


def _join(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], group: np.ndarray, tiles: int) -> BlockMask:
    """Concatenate the lists of all groups."""
    num_runs = np.concatenate([num_runs for num_runs, _, _ in found])
    counts = np.concatenate([counts for _, counts, _ in found])
    # [groups * tiles * 2] -> [groups, tiles, 2] -> [tiles]
    visits = counts.reshape(len(found), tiles, 2).sum(axis=(0, 2))
    runs = [runs for _, _, runs in found]
    found.clear()
    runs.append(np.zeros(1, dtype=np.int32))
    return BlockMask(
        offsets=torch.from_numpy(np.append(0, np.cumsum(num_runs)).astype(np.int32)),
        counts=torch.from_numpy(counts),
        runs=torch.from_numpy(_concatenate(runs, np.int32)),
        order=torch.from_numpy(np.argsort(-visits, kind="stable").astype(np.int32)),
        group=torch.from_numpy(group),
    )


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate and empty `parts`, each freed as soon as it is copied, so that no element is held twice."""
    joined = np.empty(sum(len(part) for part in parts), dtype=dtype)
    stop = len(joined)
    while parts:
        part = parts.pop()
        joined[stop - len(part) : stop] = part
        stop -= len(part)
    return joined
