"""Tasks: a selection turned into gathers of query rows and key rows that see each other in full, or nearly.

Where every row chooses for itself, a task is one block of keys and all rows, of all heads of the group, that chose it:
the keys are read once. Where whole tiles of rows choose together, a task is one tile and all blocks that it chose,
side by side: its rows need no merging. Tasks of one shape share a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.bounds import Bounds, all_see, may_see
from farspan.kernels.plan import Plan
from farspan.kernels.regions import Kind
from farspan.kernels.rows import Rows
from farspan.kernels.selection import Selection
from farspan.kernels.visibility import Visibility

SHARED_ROWS = 16
"""Rows that choose together, on average, from which on a task is made of their blocks and not of a block's rows."""
BATCH_ROWS = 1 << 17
"""Key rows that a batch of several tasks may gather: what bounds memory."""
BATCH_PAIRS = 1 << 22
"""Pairs that a batch of several tasks may have a mask for."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tasks of one shape; a row of a head is counted as row * heads + head.

    queries: int64 `[tasks, R]`, of query heads; no row occurs twice. keys: int64 `[tasks, S]`, of KV heads.
    mask: bool `[tasks, R, S]` where kind is MASKED.
    """

    kind: Kind
    queries: Tensor
    keys: Tensor
    mask: Tensor | None = None


def batches(plan: Plan, kv_heads: int) -> Iterator[Batch]:
    """Yield disjoint batches that hold every visible pair of a plan with a selection."""
    assert plan.selection is not None
    units, pieces = _Groups.of_units(plan), _Groups.of_blocks(plan)
    if not len(units) or not len(pieces):
        return
    for part in plan.parts:
        entries = _Entries.find(plan.selection, part.heads, units, pieces)
        yield from _Tasks(plan, part.visibility, units, pieces, kv_heads).of(entries)


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

    def bounds(self, visibility: Visibility) -> Bounds:
        return Bounds.of(self.rows.take(torch.from_numpy(self.order)), self.start, self.stop, visibility)

    def sizes(self) -> np.ndarray:
        return self.stop - self.start

    def members(self, groups: np.ndarray) -> np.ndarray:
        """Return the rows of these groups, one group after another."""
        return self.order[_ranges(self.start[groups], self.stop[groups])]


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Which unit of which head chose which piece: index arrays of one length, in the order of heads, units, pieces."""

    head: np.ndarray
    unit: np.ndarray
    piece: np.ndarray

    @staticmethod
    def find(selection: Selection, heads: tuple[int, ...], units: _Groups, pieces: _Groups) -> "_Entries":
        """Return the entries of these heads whose unit and block have rows here."""
        lists, chosen = selection.lists.numpy(), selection.chosen.numpy()
        unit_here = _inverse(units.number, selection.num_units)
        piece_here = _inverse(pieces.number, selection.blocks.count)
        head, unit = lists // selection.num_units, unit_here[lists % selection.num_units]
        piece = piece_here[chosen]
        here = (unit >= 0) & (piece >= 0)
        if len(heads) < selection.heads:
            here &= np.isin(head, heads)
        return _Entries(head, unit, piece).take(here)

    def take(self, index: np.ndarray) -> "_Entries":
        return _Entries(self.head[index], self.unit[index], self.piece[index])

    def __len__(self) -> int:
        return len(self.head)


@dataclass(frozen=True, slots=True, eq=False)
class _Tasks:
    plan: Plan
    visibility: Visibility
    units: _Groups
    pieces: _Groups
    kv_heads: int

    def of(self, entries: _Entries) -> Iterator[Batch]:
        queries = self.units.bounds(self.visibility).take(entries.unit)
        keys = self.pieces.bounds(self.visibility).take(entries.piece)
        whole = all_see(queries, keys, self.visibility)
        partly = ~whole & may_see(queries, keys, self.visibility)
        together = len(self.units.order) >= SHARED_ROWS * len(self.units)
        yield from self._by_tile(entries.take(whole)) if together else self._by_block(entries.take(whole))
        yield from self._partial(entries.take(partly))

    def _by_block(self, entries: _Entries) -> Iterator[Batch]:
        """One task per piece and KV head: all rows that chose it."""
        group = self._kv_head(entries.head) * len(self.pieces) + entries.piece
        for chunk in _runs_of_equal(group):
            here = entries.take(chunk)
            head, piece = self._kv_head(here.head[0]), here.piece[:1]
            yield Batch(Kind.FULL, self._queries(here)[None], self._keys(piece, head)[None])

    def _by_tile(self, entries: _Entries) -> Iterator[Batch]:
        """One task per unit and head: all pieces that it chose; units of one size and one number of keys in batches."""
        if not len(entries):
            return
        first, stop = _edges(entries.head * len(self.units) + entries.unit)
        keys = np.add.reduceat(self.pieces.sizes()[entries.piece], first)
        rows = self.units.sizes()[entries.unit[first]]
        for alike in _runs_of_equal(rows * (keys.max() + 1) + keys):
            num_rows, num_keys = int(rows[alike[0]]), int(keys[alike[0]])
            for part in np.array_split(alike, -(-len(alike) * num_keys // BATCH_ROWS)):
                chosen = entries.take(_ranges(first[part], stop[part]))
                head = np.repeat(self._kv_head(entries.head[first[part]]), keys[part])
                key_rows = self.pieces.members(chosen.piece) * self.kv_heads + head
                queries = self._queries(entries.take(first[part]))
                yield Batch(
                    Kind.FULL, queries.view(len(part), num_rows), torch.from_numpy(key_rows).view(len(part), num_keys)
                )

    def _partial(self, entries: _Entries) -> Iterator[Batch]:
        """Pairs that see some of each other: triangles where rows and keys are the same positions, else masks."""
        if not len(entries):
            return
        # A row that sees some of several pieces meets them in several rounds, as a batch may have it only once.
        start, stop = _edges(entries.head * len(self.units) + entries.unit)
        nth = np.arange(len(entries)) - np.repeat(start, stop - start)
        order = np.lexsort((entries.unit, entries.piece, entries.head, nth))
        entries, nth = entries.take(order), nth[order]
        first, stop = _edges((nth * self.plan.heads + entries.head) * len(self.pieces) + entries.piece)
        rows = np.add.reduceat(self.units.sizes()[entries.unit], first)
        keys = self.pieces.sizes()[entries.piece[first]]
        for alike in _runs_of_equal((nth[first] * (rows.max() + 1) + rows) * (keys.max() + 1) + keys):
            shape = int(rows[alike[0]]), int(keys[alike[0]])
            for part in np.array_split(alike, -(-len(alike) * shape[0] * shape[1] // BATCH_PAIRS)):
                yield from self._partial_batches(entries, first[part], stop[part], *shape)

    def _partial_batches(
        self, entries: _Entries, first: np.ndarray, stop: np.ndarray, num_rows: int, num_keys: int
    ) -> Iterator[Batch]:
        """Tasks of entries [first, stop), each of one head and piece."""
        row = self.units.members(entries.unit[_ranges(first, stop)]).reshape(-1, num_rows)
        key = self.pieces.members(entries.piece[first]).reshape(-1, num_keys)
        head = entries.head[first, None]
        queries, keys = torch.from_numpy(row), torch.from_numpy(key)
        position, document = self.plan.queries.position[queries], self.plan.queries.document[queries]
        key_position, key_document = self.plan.keys.position[keys], self.plan.keys.document[keys]
        triangle = torch.zeros(len(first), dtype=torch.bool)
        if num_rows == num_keys and self.visibility == Visibility(causal=True):
            ascending = (position.diff(dim=1) > 0).all(dim=1)
            one = document[:, :1]
            one_document = ((document == one) & (key_document == one)).all(dim=1)
            triangle = ascending & one_document & (position == key_position).all(dim=1)
        query_index = queries * self.plan.heads + torch.from_numpy(head)
        key_index = keys * self.kv_heads + torch.from_numpy(self._kv_head(head))
        if triangle.any():
            yield Batch(Kind.CAUSAL, query_index[triangle], key_index[triangle])
        if not triangle.all():
            edge = ~triangle
            mask = self.visibility.shows(
                position[edge, :, None], document[edge, :, None], key_position[edge, None], key_document[edge, None]
            )
            yield Batch(Kind.MASKED, query_index[edge], key_index[edge], mask)

    def _kv_head(self, head: Any) -> Any:
        """Return the KV head of a query head, or of an array of them."""
        return head // (self.plan.heads // self.kv_heads)

    def _queries(self, entries: _Entries) -> Tensor:
        """Return the rows of each entry's unit, in its head."""
        head = np.repeat(entries.head, self.units.sizes()[entries.unit])
        return torch.from_numpy(self.units.members(entries.unit) * self.plan.heads + head)

    def _keys(self, piece: np.ndarray, kv_head: int) -> Tensor:
        return torch.from_numpy(self.pieces.members(piece) * self.kv_heads + kv_head)


def _edges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each stretch of equal values starts and stops."""
    start = np.flatnonzero(np.diff(values, prepend=-1))
    return start, np.append(start[1:], len(values))[: len(start)]


def _ranges(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return start[0], ..., stop[0] - 1, start[1], ..., one range after another."""
    sizes = stop - start
    return np.arange(sizes.sum()) + np.repeat(start - np.cumsum(sizes) + sizes, sizes)


def _inverse(number: np.ndarray, count: int) -> np.ndarray:
    """Return int64 `[count]`: the place of each number in `number`, -1 where it is absent."""
    place = np.full(count, -1, dtype=np.int64)
    place[number] = np.arange(len(number))
    return place


def _runs_of_equal(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for each distinct value, where it stands, ascending."""
    if not len(values):
        return
    order = np.argsort(values, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(values[order])) + 1)
