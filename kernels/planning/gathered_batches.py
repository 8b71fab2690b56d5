"""Tasks: a selection turned into gathers of query rows and key rows that see each other in full, or nearly.

Where every row chooses for itself, a task is one block of keys and all rows, of all heads of the group, that chose it:
the keys are read once. Where whole tiles of rows choose together, a task is one tile and all blocks that it chose,
side by side: its rows need no merging. Tasks of one shape share a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planning.bounds import Bounds, all_see, may_see
from farspan.kernels.planning.plan import Plan
from farspan.kernels.ragged import ranges
from farspan.kernels.planning.regions import Kind

SHARED_ROWS = 16
"""Rows that choose together, on average, from which on a task is made of their blocks and not of a block's rows."""
ENTRIES_AT_ONCE = 1 << 16
"""Pairs of a unit and a block whose bounds are compared at the same time: few enough for a cache."""
BATCH_ROWS = 1 << 17
"""Key rows that a batch of several tasks may gather: what bounds memory."""
BATCH_PAIRS = 1 << 22
"""Pairs that a batch of several tasks may have a mask for."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tasks of one shape; a row of a head is counted as row * heads + head.

    queries: int32 or int64 `[tasks, R]`, of query heads; no row occurs twice. keys: int64 `[tasks, S]`, of KV heads.
    mask: bool `[tasks, R, S]` where kind is MASKED. surplus: how many rows at the end of the last task only fill it up,
    and repeat its last; they count for nothing.
    """

    kind: Kind
    queries: Tensor
    keys: Tensor
    mask: Tensor | None = None
    surplus: int = 0

    def pairs(self) -> int:
        """Return the number of visible pairs."""
        tasks, rows = self.queries.shape
        if self.mask is not None:
            return int(self.mask.sum())
        if self.kind is Kind.CAUSAL:
            return tasks * (rows * (rows + 1) // 2)
        return (tasks * rows - self.surplus) * self.keys.shape[1]


def batches(plan: Plan, kv_heads: int) -> Iterator[Batch]:
    """Yield disjoint batches that hold every visible pair of a plan with a selection."""
    assert plan.selection is not None
    assert plan.selection.heads % kv_heads == 0, "query heads that choose together share a KV head"
    units, pieces = _Groups.of_units(plan), _Groups.of_blocks(plan)
    if not len(units) or not len(pieces):
        return
    for part in plan.parts:
        choosers = _Choosers.of(part.heads, plan.heads // plan.selection.heads)
        lists = _Lists.of(plan.selection, choosers, units, plan.heads)
        entries = _Entries.find(plan.selection, lists, pieces)
        yield from _Tasks(plan, part.attention_mask, choosers, units, pieces, lists, kv_heads).of(entries)


def choose_together(plan: Plan) -> bool:
    """Return whether whole tiles of rows choose, so that tasks list pairs of a tile and a key: more than linear."""
    assert plan.selection is not None
    return len(plan.queries) >= SHARED_ROWS * plan.selection.num_units


def count_pairs(plan: Plan, kv_heads: int) -> int:
    """Return the number of visible (query, key) pairs of a plan with a selection, the mean over heads."""
    return sum(batch.pairs() for batch in batches(plan, kv_heads)) // plan.heads


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Rows by a number that some share: rows order[start[i]:stop[i]] share `number[i]`; ascending, none empty."""

    number: np.ndarray
    order: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rows: Rows

    @staticmethod
    def by(number: np.ndarray, rows: Rows) -> "_Groups":
        order = np.argsort(number, kind="stable")
        order = order[np.searchsorted(number[order], 0) :]  # -1 belongs to no group
        start, stop = _edges(number[order])
        return _Groups(number[order][start], order, start, stop, rows)

    @staticmethod
    def of_units(plan: Plan) -> "_Groups":
        assert plan.selection is not None
        unit = plan.selection.unit.masked_fill(plan.queries.document < 0, -1)
        return _Groups.by(unit.numpy(), plan.queries)

    @staticmethod
    def of_blocks(plan: Plan) -> "_Groups":
        assert plan.selection is not None
        return _Groups.by(plan.selection.blocks.of(plan.keys).numpy(), plan.keys)

    def __len__(self) -> int:
        return len(self.number)

    def bounds(self, attention_mask: AttentionMask) -> Bounds:
        return Bounds.of(self.rows.take(torch.from_numpy(self.order)), self.start, self.stop, attention_mask)

    def sizes(self) -> np.ndarray:
        return self.stop - self.start

    def members(self, groups: np.ndarray) -> np.ndarray:
        """Return the rows of these groups, one group after another."""
        return self.order[ranges(self.start[groups], self.stop[groups])]


@dataclass(frozen=True, slots=True, eq=False)
class _Choosers:
    """The heads that a selection has lists for, `number`, and the query heads of each: heads[start[i]:stop[i]]."""

    number: np.ndarray
    heads: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @staticmethod
    def of(heads: tuple[int, ...], group: int) -> "_Choosers":
        array = np.array(heads)
        start, stop = _edges(array // group)
        return _Choosers(array[start] // group, array, start, stop)

    def sizes(self) -> np.ndarray:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class _Lists:
    """Who wrote each list of a selection, int32 `[lists]`: a chooser and a unit, -1 for those without rows here.

    queries: the rows of the lists' units in each query head of their choosers, one list after another; those of list l
    are queries[first[l]:first[l + 1]].
    """

    chooser: np.ndarray
    unit: np.ndarray
    queries: np.ndarray
    first: np.ndarray

    @staticmethod
    def of(selection: BlockSelection, choosers: _Choosers, units: _Groups, heads: int) -> "_Lists":
        chooser = np.repeat(_inverse(choosers.number, selection.heads), selection.num_units)
        unit = np.tile(_inverse(units.number, selection.num_units), selection.heads)
        here = (chooser >= 0) & (unit >= 0)
        chooser[~here] = unit[~here] = -1
        by, rows = chooser[here], units.members(unit[here])
        of_row = np.repeat(by, units.sizes()[unit[here]])
        queries = np.repeat(rows, choosers.sizes()[of_row]) * heads
        queries += choosers.heads[ranges(choosers.start[of_row], choosers.stop[of_row])]
        sizes = np.zeros(len(here) + 1, dtype=np.int64)
        sizes[1:][here] = units.sizes()[unit[here]] * choosers.sizes()[by]
        # Entries are gathered from this table by the million: half the width is half the time.
        narrow = len(units.rows) * heads <= np.iinfo(np.int32).max
        return _Lists(chooser, unit, queries.astype(np.int32 if narrow else np.int64), sizes.cumsum())

    def sizes(self) -> np.ndarray:
        return self.first[1:] - self.first[:-1]

    def members(self, lists: np.ndarray) -> np.ndarray:
        """Return the queries of these lists, one list after another."""
        return self.queries[ranges(self.first[lists], self.first[lists + 1])]


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Which list names which piece: int32 arrays of one length, in the order of lists."""

    list: np.ndarray
    piece: np.ndarray

    @staticmethod
    def find(selection: BlockSelection, lists: _Lists, pieces: _Groups) -> "_Entries":
        """Return the entries of lists that have rows here, if their blocks do too."""
        number = np.arange(len(lists.unit), dtype=np.int32)
        number[lists.unit < 0] = -1
        of = np.repeat(number, selection.offsets.diff().numpy())
        piece = _inverse(pieces.number, selection.blocks.count)[selection.chosen.numpy()]
        return _Entries(of, piece).where((piece >= 0) & (of >= 0))

    def where(self, keep: np.ndarray) -> "_Entries":
        """Return the entries where `keep` is True."""
        return self if keep.all() else self.take(np.flatnonzero(keep))

    def take(self, index: np.ndarray) -> "_Entries":
        return _Entries(self.list[index], self.piece[index])

    def __len__(self) -> int:
        return len(self.list)


@dataclass(frozen=True, slots=True, eq=False)
class _Tasks:
    plan: Plan
    attention_mask: AttentionMask
    choosers: _Choosers
    units: _Groups
    pieces: _Groups
    lists: _Lists
    kv_heads: int

    def of(self, entries: _Entries) -> Iterator[Batch]:
        together = choose_together(self.plan)
        whole, partly = self._visible(entries, triangles=self.attention_mask.causal and not together)
        yield from self._by_tile(entries.where(whole)) if together else self._by_block(entries.where(whole))
        yield from self._partial(entries.where(partly))

    def _visible(self, entries: _Entries, *, triangles: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return of which entries all pairs are visible, and of which some may be.

        triangles: a block's last row, which sees all of it, is kept with the others: without it they are no triangle.
        """
        units, pieces = (groups.bounds(self.attention_mask) for groups in (self.units, self.pieces))
        whole, partly = (np.empty(len(entries), dtype=bool) for _ in range(2))
        for start in range(0, len(entries), ENTRIES_AT_ONCE):
            part = slice(start, start + ENTRIES_AT_ONCE)
            queries = units.take(self.lists.unit[entries.list[part]])
            keys = pieces.take(entries.piece[part])
            sees = all_see(queries, keys, self.attention_mask)
            if triangles:
                sees &= queries.position_low != keys.position_high
            whole[part] = sees
            partly[part] = ~sees & may_see(queries, keys, self.attention_mask)
        return whole, partly

    def _by_block(self, entries: _Entries) -> Iterator[Batch]:
        """One task per piece and KV head: all rows that chose it."""
        kv_head = self._kv_head(self.lists.chooser)
        group = kv_head[entries.list] * len(self.pieces) + entries.piece
        for chunk in _runs_of_equal(group):
            of = entries.list[chunk]
            keys = self.pieces.members(entries.piece[chunk[:1]]) * self.kv_heads + kv_head[of[0]]
            yield _spread(torch.from_numpy(self.lists.members(of))[None], torch.from_numpy(keys)[None])

    def _by_tile(self, entries: _Entries) -> Iterator[Batch]:
        """One task per unit and chooser: all pieces that it chose; tasks of one shape in batches."""
        if not len(entries):
            return
        first, stop = _edges(entries.list)
        keys = np.add.reduceat(self.pieces.sizes()[entries.piece], first)
        of = entries.list[first]
        rows = self.lists.sizes()[of]
        for alike in _runs_of_equal(rows * (keys.max() + 1) + keys):
            shape = int(rows[alike[0]]), int(keys[alike[0]])
            for part in np.array_split(alike, -(-len(alike) * shape[1] // BATCH_ROWS)):
                chosen = entries.piece[ranges(first[part], stop[part])]
                kv_head = np.repeat(self._kv_head(self.lists.chooser[of[part]]), shape[1])
                key_rows = self.pieces.members(chosen) * self.kv_heads + kv_head
                queries = self.lists.members(of[part]).reshape(-1, shape[0])
                yield _spread(torch.from_numpy(queries), torch.from_numpy(key_rows.reshape(-1, shape[1])))

    def _partial(self, entries: _Entries) -> Iterator[Batch]:
        """Pairs that see some of each other: triangles where rows and keys are the same positions, else masks."""
        if not len(entries):
            return
        # Every query head by itself, as only then a task's rows may form a triangle with its keys.
        chooser = self.lists.chooser[entries.list]
        head = self.choosers.heads[ranges(self.choosers.start[chooser], self.choosers.stop[chooser])]
        each = np.repeat(np.arange(len(entries)), self.choosers.sizes()[chooser])
        unit, piece = self.lists.unit[entries.list[each]], entries.piece[each]
        # A row that sees some of several pieces meets them in several rounds, as a batch may have it only once.
        order = np.lexsort((piece, unit, head))
        unit, piece, head = unit[order], piece[order], head[order]
        start, stop = _edges(head * len(self.units) + unit)
        nth = np.arange(len(unit)) - np.repeat(start, stop - start)
        order = np.lexsort((unit, piece, head, nth))
        unit, piece, head, nth = unit[order], piece[order], head[order], nth[order]
        first, stop = _edges((nth * self.plan.heads + head) * len(self.pieces) + piece)
        rows = np.add.reduceat(self.units.sizes()[unit], first)
        keys = self.pieces.sizes()[piece[first]]
        for alike in _runs_of_equal((nth[first] * (rows.max() + 1) + rows) * (keys.max() + 1) + keys):
            shape = int(rows[alike[0]]), int(keys[alike[0]])
            for part in np.array_split(alike, -(-len(alike) * shape[0] * shape[1] // BATCH_PAIRS)):
                row = self.units.members(unit[ranges(first[part], stop[part])])
                key = self.pieces.members(piece[first[part]])
                yield from self._partial_batches(
                    torch.from_numpy(row.reshape(-1, shape[0])), torch.from_numpy(key.reshape(-1, shape[1])),
                    torch.from_numpy(head[first[part], None]),
                )  # fmt: skip

    def _partial_batches(self, queries: Tensor, keys: Tensor, head: Tensor) -> Iterator[Batch]:
        """Tasks of rows `[tasks, R]` and `[tasks, S]`, each of one query head `[tasks, 1]`."""
        position, document = self.plan.queries.position[queries], self.plan.queries.document[queries]
        key_position, key_document = self.plan.keys.position[keys], self.plan.keys.document[keys]
        triangle = torch.zeros(len(queries), dtype=torch.bool)
        if queries.shape == keys.shape and self.attention_mask == AttentionMask(causal=True):
            ascending = (position.diff(dim=1) > 0).all(dim=1)
            one = document[:, :1]
            one_document = ((document == one) & (key_document == one)).all(dim=1)
            triangle = ascending & one_document & (position == key_position).all(dim=1)
        query_index = queries * self.plan.heads + head
        key_index = keys * self.kv_heads + head // (self.plan.heads // self.kv_heads)
        if triangle.any():
            yield Batch(Kind.CAUSAL, query_index[triangle], key_index[triangle])
        if not triangle.all():
            edge = ~triangle
            mask = self.attention_mask.mask_mod(
                position[edge, :, None], document[edge, :, None], key_position[edge, None], key_document[edge, None]
            )
            yield Batch(Kind.MASKED, query_index[edge], key_index[edge], mask)

    def _kv_head(self, chooser: np.ndarray) -> np.ndarray:
        """Return the KV head of these choosers' query heads, int32."""
        kv_head = self.choosers.heads[self.choosers.start] // (self.plan.heads // self.kv_heads)
        return kv_head.astype(np.int32)[chooser]


def _spread(queries: Tensor, keys: Tensor) -> Batch:
    """Tasks whose rows see all their keys; where they are few, each as several, one for each thread to work on."""
    tasks, rows = queries.shape
    count = 1 if tasks >= 2 * torch.get_num_threads() else torch.get_num_threads()
    surplus = -rows % count
    if rows < count or (surplus and tasks > 1):
        return Batch(Kind.FULL, queries, keys)
    filled = torch.cat((queries, queries[:, -1:].expand(-1, surplus)), dim=1) if surplus else queries
    return Batch(Kind.FULL, filled.reshape(tasks * count, -1), keys.repeat_interleave(count, dim=0), surplus=surplus)


def _edges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each stretch of equal values starts and stops."""
    start = np.flatnonzero(np.diff(values, prepend=-1))
    return start, np.append(start[1:], len(values))[: len(start)]


def _inverse(number: np.ndarray, count: int) -> np.ndarray:
    """Return int32 `[count]`: the place of each number in `number`, -1 where it is absent."""
    place = np.full(count, -1, dtype=np.int32)
    place[number] = np.arange(len(number))
    return place


def _runs_of_equal(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for each distinct value, where it stands, ascending."""
    if not len(values):
        return
    if values.max() < 1 << 16:
        # numpy sorts 16 bits by radix, anything wider by comparisons.
        order, counts = np.argsort(values.astype(np.uint16), kind="stable"), np.bincount(values)
        yield from np.split(order, np.cumsum(counts[counts > 0])[:-1])
    else:
        order = np.argsort(values, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
