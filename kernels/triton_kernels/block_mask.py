"""Tile lists: for each tile of rows the tiles of the other side to visit, as intervals, found from bounds alone.

A visit is full where all rows of the queries' tile that are not padding see all keys of the keys' tile, and partial
where only the predicate can tell. Lists are kept as CSR; an entry is an interval of tiles in one int32, so that dense
attention takes a few entries per list, and scattered blocks take 4 bytes each.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import PADDING, Rows
from farspan.kernels.planning.bounds import Bounds, all_see, may_see
from farspan.kernels.planning.candidates import candidates
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.ragged import ranges
from farspan.kernels.planning.tiles import Tiling

COUNT_BITS = 12
"""Low bits of an entry: the number of tiles in the interval. The others: its first tile."""
MAX_COUNT = (1 << COUNT_BITS) - 1
MAX_TILES = (1 << (31 - COUNT_BITS)) - 1
COARSE = 16
"""Tiles, on either side, that are ruled out or in together before they are looked at one by one."""
PAIRS_AT_ONCE = 1 << 17
"""Pairs of tiles that are looked at in one go."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockMask:
    """For each list the full visits, then the partial ones; list number = group * tiles + tile.

    offsets: int32 `[2 * lists + 1]`, where the entries of list l start: full at 2 l, partial at 2 l + 1.
    visits: int32 `[2 * lists]`, the number of tiles in them. entries: int32, first tile << COUNT_BITS | count; one
    more than there are, so that a kernel may read one ahead. order: int32 `[tiles]`, those with most visits first, so
    that no long one is left for the end. group: int32 `[heads]`, the group whose lists each query head follows.
    """

    offsets: Tensor
    visits: Tensor
    entries: Tensor
    order: Tensor
    group: Tensor

    @property
    def tiles(self) -> int:
        return len(self.order)

    def to(self, device: torch.device) -> "BlockMask":
        """Return the same lists on `device`."""
        return BlockMask(
            offsets=self.offsets.to(device),
            visits=self.visits.to(device),
            entries=self.entries.to(device),
            order=self.order.to(device),
            group=self.group.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TiledPlan:
    """Tiles of query rows and of key rows, and the lists of those on the side that stays: of queries or of keys."""

    queries: Tiling
    keys: Tiling
    lists: BlockMask


def real_rows(plan: Plan) -> tuple[Rows, Rows]:
    """Return the rows of queries and of keys, padding also where the selection has no unit or block for a row."""
    if plan.selection is None:
        return plan.queries, plan.keys
    return (
        _without(plan.queries, plan.selection.unit < 0),
        _without(plan.keys, plan.selection.blocks.of(plan.keys) < 0),
    )


def tile_plan(plan: Plan, query_tile: int, key_tile: int, staying: Literal["queries", "keys"]) -> TiledPlan:
    """Return tiles and lists of a plan for tiles of so many rows; a selection must be of tiles of rows.

    staying: the side whose tiles own a list, of tiles of the other side. Raises ValueError for too many tiles.
    """
    queries, keys = _tilings(plan, query_tile, key_tile)
    if max(len(queries), len(keys)) > MAX_TILES:
        raise ValueError(
            f"{len(plan.queries)} queries and {len(plan.keys)} keys make more than {MAX_TILES} tiles of "
            f"{query_tile} x {key_tile}: split the sequence over more ranks"
        )
    rows, columns = (queries, keys) if staying == "queries" else (keys, queries)
    group, members = _groups(plan)
    found = []
    for part, head in members:
        pairs = _pairs(plan, part, head, queries, keys)
        if staying == "keys":
            pairs = (_Pairs(x.columns, x.rows, x.partial, x.width) for x in pairs)
        found.append(_encode(pairs, len(rows), len(columns)))
    return TiledPlan(queries=queries, keys=keys, lists=_join(found, group, len(rows)))


def _tilings(plan: Plan, query_tile: int, key_tile: int) -> tuple[Tiling, Tiling]:
    if plan.selection is None:
        return Tiling.of(plan.queries, query_tile), Tiling.of(plan.keys, key_tile)
    unit, block = plan.selection.unit, plan.selection.blocks.of(plan.keys)
    return Tiling.of(plan.queries, query_tile, unit), Tiling.of(plan.keys, key_tile, block)


def _without(rows: Rows, absent: Tensor) -> Rows:
    return Rows(position=rows.position, document=rows.document.masked_fill(absent, PADDING))


def _groups(plan: Plan) -> tuple[np.ndarray, list[tuple[HeadPlan, int]]]:
    """Return the group of each query head, and the part and first head of each group; one group sees the same."""
    number: dict[tuple[int, bytes, int], int] = {}
    members: list[tuple[HeadPlan, int]] = []
    group = np.zeros(plan.heads, dtype=np.int32)
    for part_number, part in enumerate(plan.parts):
        for head in part.heads:
            key = part_number, _digest(plan, head), _kv_head(plan, head)
            if key not in number:
                number[key] = len(members)
                members.append((part, head))
            group[head] = number[key]
    return group, members


def _digest(plan: Plan, head: int) -> bytes:
    """Return what tells the lists of a head from other lists."""
    if plan.selection is None:
        return b""
    offsets, chosen = _lists_of(plan, head)
    digest = hashlib.blake2b(offsets.tobytes(), digest_size=16)
    digest.update(chosen.data)
    return digest.digest()


def _lists_of(plan: Plan, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the lists of a head's units start, and the blocks on them."""
    selection = plan.selection
    assert selection is not None
    first = head * selection.heads // plan.heads * selection.num_units
    offsets = selection.offsets[first : first + selection.num_units + 1].numpy()
    return offsets - offsets[0], selection.chosen[int(offsets[0]) : int(offsets[-1])].contiguous().numpy()


def _kv_head(plan: Plan, head: int) -> int:
    """Return the row of `plan.lifetime` of a query head; 0 if there is none."""
    return 0 if plan.lifetime is None else head * len(plan.lifetime) // plan.heads


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Squares of `width` x `width` tiles, each row tile visiting each column tile in the same way."""

    rows: np.ndarray
    columns: np.ndarray
    partial: np.ndarray
    width: int


def _pairs(plan: Plan, part: HeadPlan, head: int, queries: Tiling, keys: Tiling) -> Iterator[_Pairs]:
    """Yield the visits of query tiles (rows) to key tiles (columns) of a head, each once."""
    lifetime = None if plan.lifetime is None else plan.lifetime[_kv_head(plan, head)].numpy()
    attention_mask = part.attention_mask

    def bounds(tiles: int) -> tuple[Bounds, Bounds]:
        of_queries = queries.bounds(attention_mask, tiles=tiles)
        # Rows of padding in a tile of queries see nothing whatever the predicate says: kernels store nothing for them.
        seeing = replace(of_queries, padded=np.zeros_like(of_queries.padded))
        return seeing, keys.bounds(attention_mask, lifetime, tiles)

    fine = bounds(1)
    if plan.selection is not None:
        for i, j in _chosen(plan, head, queries, keys):
            yield _sort_out(i, j, *fine, attention_mask)
        return
    coarse = bounds(COARSE)
    for i, j in candidates(*coarse, attention_mask):
        whole = all_see(coarse[0].take(i), coarse[1].take(j), attention_mask)
        yield _Pairs(i[whole], j[whole], np.zeros(int(whole.sum()), dtype=bool), COARSE)
        rest = np.flatnonzero(~whole)
        for at in range(0, len(rest), PAIRS_AT_ONCE // COARSE**2):
            some = rest[at : at + PAIRS_AT_ONCE // COARSE**2]
            rows = (i[some, None, None] * COARSE + np.arange(COARSE)[:, None]).repeat(COARSE, axis=2).reshape(-1)
            columns = (j[some, None, None] * COARSE + np.arange(COARSE)).repeat(COARSE, axis=1).reshape(-1)
            inside = (rows < len(queries)) & (columns < len(keys))
            yield _sort_out(rows[inside], columns[inside], *fine, attention_mask)


def _sort_out(i: np.ndarray, j: np.ndarray, queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> _Pairs:
    """Drop the pairs of tiles that cannot see each other, and tell the full from the partial."""
    of_queries, of_keys = queries.take(i), keys.take(j)
    may = may_see(of_queries, of_keys, attention_mask)
    whole = all_see(of_queries, of_keys, attention_mask)
    return _Pairs(i[may].astype(np.int32), j[may].astype(np.int32), ~whole[may], 1)


def _chosen(plan: Plan, head: int, queries: Tiling, keys: Tiling) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs (query tile, key tile) that a head chose, in stretches of its lists."""
    assert plan.selection is not None
    unit_first, unit_stop = queries.of_number(plan.selection.num_units)
    block_first, block_stop = keys.of_number(plan.selection.blocks.count)
    of_unit, of_block = unit_stop - unit_first, block_stop - block_first
    offsets, chosen = _lists_of(plan, head)
    # An entry is as many pairs as its unit and its block have tiles here.
    step = max(PAIRS_AT_ONCE // max(int(of_unit.max(initial=1)) * int(of_block.max(initial=1)), 1), 1)
    for at in range(0, len(chosen), step):
        block = chosen[at : at + step]
        unit = np.searchsorted(offsets, np.arange(at, at + len(block)), side="right") - 1
        # Each entry once for each tile of its unit, then once for each tile of its block.
        i = ranges(unit_first[unit], unit_stop[unit])
        block = block.repeat(of_unit[unit])
        yield i.repeat(of_block[block]), ranges(block_first[block], block_stop[block])


def _encode(pairs: Iterator[_Pairs], rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of entries `[2 * rows]`, visits `[2 * rows]` and entries of one group.

    An interval is one int64 while it is sorted: list, 31 bits of entry.
    """
    keys: list[np.ndarray] = []
    for found in pairs:
        if found.width == 1:
            keys.append(_key(found.rows, found.columns, 1, found.partial))
        elif len(found.rows):
            keys.append(_squares(found, rows, columns))
    key = _concatenate(keys, np.int64)
    key.sort()
    counts, visits = np.zeros(2 * rows, dtype=np.int64), np.zeros(2 * rows, dtype=np.int32)
    entries, at = [], 0
    while at < len(key):
        # Some whole lists at a time: what is needed on the way is many times as large as the entries.
        stop = min(at + PAIRS_AT_ONCE, len(key)) - 1
        stop = int(np.searchsorted(key, ((key[stop] >> 31) + 1) << 31))
        number, length, entry = _intervals(key[at:stop])
        counts += np.bincount(number, minlength=2 * rows)
        visits += np.bincount(number, weights=length, minlength=2 * rows).astype(np.int32)
        entries.append(entry)
        at = stop
    return counts, visits, _concatenate(entries, np.int32)


def _intervals(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join intervals that follow each other, cut those too long for an entry; return list, length, entry of each."""
    first, length = key >> COUNT_BITS, key & MAX_COUNT
    starts = np.flatnonzero(np.append(True, first[1:] != first[:-1] + length[:-1]))
    first, length = first[starts], np.add.reduceat(length, starts)
    pieces = -(-length // MAX_COUNT)
    nth = ranges(np.zeros_like(pieces), pieces)
    first, length = first.repeat(pieces) + nth * MAX_COUNT, length.repeat(pieces) - nth * MAX_COUNT
    length = np.minimum(length, MAX_COUNT)
    return first >> (31 - COUNT_BITS), length, ((first & MAX_TILES) << COUNT_BITS | length).astype(np.int32)


def _key(row: np.ndarray, first: np.ndarray, count: np.ndarray | int, partial: np.ndarray) -> np.ndarray:
    entry = first.astype(np.int64) << COUNT_BITS | count
    return (row.astype(np.int64) * 2 + partial) << 31 | entry


def _squares(found: _Pairs, rows: int, columns: int) -> np.ndarray:
    """Return the intervals of squares of full visits: joined along the columns, then once for each row tile."""
    order = np.lexsort((found.columns, found.rows))
    row, column = found.rows[order], found.columns[order]
    borders = np.append(True, (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1))
    # No interval may be longer than an entry can say.
    nth = np.arange(len(row)) - np.maximum.accumulate(np.where(borders, np.arange(len(row)), 0))
    starts = np.flatnonzero(borders | (nth % (MAX_COUNT // found.width) == 0))
    length = np.diff(np.append(starts, len(row)))
    first = column[starts] * found.width
    count = np.minimum(first + length * found.width, columns) - first
    tile = row[starts, None] * found.width + np.arange(found.width)
    inside = tile < rows
    spread = [np.broadcast_to(x[:, None], tile.shape)[inside] for x in (first, count)]
    return _key(tile[inside], spread[0], spread[1], np.zeros(int(inside.sum()), dtype=bool))


def _join(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], group: np.ndarray, tiles: int) -> BlockMask:
    """Put the lists of all groups one after another."""
    counts = np.concatenate([counts for counts, _, _ in found])
    visits = np.concatenate([visits for _, visits, _ in found])
    work = visits.reshape(len(found), tiles, 2).sum(axis=(0, 2))
    entries = [entries for _, _, entries in found]
    found.clear()
    entries.append(np.zeros(1, dtype=np.int32))
    return BlockMask(
        offsets=torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32)),
        visits=torch.from_numpy(visits),
        entries=torch.from_numpy(_concatenate(entries, np.int32)),
        order=torch.from_numpy(np.argsort(-work, kind="stable").astype(np.int32)),
        group=torch.from_numpy(group),
    )


def _concatenate(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate and empty `pieces`, each given back as soon as it is copied: the whole is not held twice."""
    whole = np.empty(sum(len(piece) for piece in pieces), dtype=dtype)
    at = len(whole)
    while pieces:
        piece = pieces.pop()
        whole[at - len(piece) : at] = piece
        at -= len(piece)
    return whole
