"""Alive: a plan with lifetimes turned into gathers of tiles of query rows and of the keys that are alive for them.

A key is alive over one stretch of queries, its own position to its last: so every tile of neighbouring queries finds
its keys without looking at the others. Those alive for the whole tile need no mask: global ones, mostly.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from farspan.kernels.plan import Plan
from farspan.kernels.regions import Kind
from farspan.kernels.rows import Rows
from farspan.kernels.tasks import BATCH_PAIRS, BATCH_ROWS, Batch

TILE = 128
"""Query rows that look for their keys together."""
KEYS_ALIKE = 64
"""Tiles take keys without a mask by this many, so that enough tiles are alike and share a batch."""
ENTRIES_AT_ONCE = 1 << 22
"""Pairs of a tile and a key that are listed at the same time, unless a single tile has more."""


def alive_batches(plan: Plan, kv_heads: int) -> Iterator[Batch]:
    """Yield disjoint batches that hold every visible pair of a plan with lifetimes."""
    assert plan.lifetime is not None
    assert len(plan.lifetime) == kv_heads, "every KV head has lifetimes of its own"
    queries, keys = _InLine.of(plan.queries), _InLine.of(plan.keys)
    if not len(queries.row) or not len(keys.row):
        return
    last = keys.document * (1 << 32) + plan.lifetime.numpy()[:, keys.row].astype(np.int64)
    tiles = _Tiles(plan, kv_heads, queries, keys, last)
    for start, stop in tiles.portions():
        yield from tiles.batches(start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class _InLine:
    """Rows that are not padding, by document and position; `ordinal` is a number that orders them so."""

    row: np.ndarray
    document: np.ndarray
    ordinal: np.ndarray

    @staticmethod
    def of(rows: Rows) -> "_InLine":
        position, document = rows.position.numpy().astype(np.int64), rows.document.numpy().astype(np.int64)
        ordinal = document * (1 << 32) + position
        row = np.argsort(ordinal, kind="stable")
        row = row[np.searchsorted(document[row], 0) :]
        return _InLine(row, document[row], ordinal[row])


class _Tiles:
    """Tiles of the queries in line, and of each key of each KV head the tiles that it is alive for: first to stop."""

    def __init__(self, plan: Plan, kv_heads: int, queries: _InLine, keys: _InLine, last: np.ndarray) -> None:
        self.plan, self.kv_heads, self.queries, self.keys, self.last = plan, kv_heads, queries, keys, last
        self.count = -(-len(queries.row) // TILE)
        self.low = queries.ordinal[::TILE]
        self.high = queries.ordinal[np.minimum(np.arange(1, self.count + 1) * TILE, len(queries.row)) - 1]
        self.first = np.broadcast_to(np.searchsorted(self.high, keys.ordinal), last.shape)
        self.stop = np.maximum(np.searchsorted(self.low, last, side="right"), self.first)

    def portions(self) -> Iterator[tuple[int, int]]:
        """Yield stretches of tiles, at least one, that have about ENTRIES_AT_ONCE keys together."""
        begun, over = (np.bincount(x.flatten(), minlength=self.count + 1) for x in (self.first, self.stop))
        ends = np.cumsum(np.cumsum(begun - over)[: self.count])
        start = 0
        while start < self.count:
            limit = (ends[start - 1] if start else 0) + ENTRIES_AT_ONCE
            stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
            yield start, stop
            start = stop

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of tiles [start, stop)."""
        first, over = np.clip(self.first, start, stop), np.clip(self.stop, start, stop)
        sizes = (over - first).flatten()
        entry = np.repeat(np.arange(sizes.size), sizes)
        if not len(entry):
            return
        tile = np.arange(len(entry)) - np.repeat(np.cumsum(sizes) - sizes - first.flatten(), sizes)
        head, key = np.divmod(entry, len(self.keys.row))
        whole = (self.keys.ordinal[key] <= self.low[tile]) & (self.last[head, key] >= self.high[tile])
        task = head * self.count + tile
        # Of each task first the keys that the whole tile sees.
        order = np.argsort(task * 2 + ~whole, kind="stable")
        task, key = task[order], key[order]
        begin = np.flatnonzero(np.diff(task, prepend=-1))
        end = np.append(begin[1:], len(task))
        middle = begin + np.add.reduceat(whole[order], begin, dtype=np.int64) // KEYS_ALIKE * KEYS_ALIKE
        for is_whole, low, high in ((True, begin, middle), (False, middle, end)):
            width = -(-(high - low) // KEYS_ALIKE) * KEYS_ALIKE
            rows = np.minimum(len(self.queries.row) - task[begin] % self.count * TILE, TILE)
            for alike in _alike(rows, width):
                shape = int(rows[alike[0]]), int(width[alike[0]])
                if shape[1]:
                    for part in np.array_split(alike, self._parts(len(alike), shape, is_whole)):
                        nth = np.arange(shape[1])
                        column = np.minimum(low[part, None] + nth, high[part, None] - 1)
                        real = nth < (high - low)[part, None]
                        yield self._batch(task[begin[part]], key[column], None if is_whole else real, shape[0])

    def _parts(self, tasks: int, shape: tuple[int, int], is_whole: bool) -> int:
        """Return into how many batches tasks of `shape`, rows and keys, are split to bound memory."""
        rows = shape[0] * self.plan.heads // self.kv_heads
        size, limit = (shape[1], BATCH_ROWS) if is_whole else (rows * shape[1], BATCH_PAIRS)
        return min(-(-tasks * size // limit), tasks)

    def _batch(self, task: np.ndarray, key: np.ndarray, real: np.ndarray | None, rows: int) -> Batch:
        """Return the batch of tasks `[n]` with keys `[n, S]`, of which `real` are seen by some row of the tile."""
        head, tile = np.divmod(task[:, None], self.count)
        place = tile * TILE + np.arange(rows)
        group = self.plan.heads // self.kv_heads
        query_head = np.tile(np.arange(group), rows) + head * group
        query_index = np.repeat(self.queries.row[place], group, axis=1) * self.plan.heads + query_head
        key_index = self.keys.row[key] * self.kv_heads + head
        if real is None:
            return Batch(Kind.FULL, torch.from_numpy(query_index), torch.from_numpy(key_index))
        query, born, last = self.queries.ordinal[place], self.keys.ordinal[key], self.last[head, key]
        alive = (born[:, None] <= query[:, :, None]) & (query[:, :, None] <= last[:, None]) & real[:, None]
        mask = torch.from_numpy(np.repeat(alive, group, axis=1))
        return Batch(Kind.MASKED, torch.from_numpy(query_index), torch.from_numpy(key_index), mask)


def _alike(rows: np.ndarray, width: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the tasks of each shape."""
    shape = rows * (width.max() + 1) + width
    order = np.argsort(shape, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(shape[order])) + 1)
