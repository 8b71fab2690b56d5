"""Alive: a plan with lifetimes turned into gathers of tiles of query rows and of the keys that are alive for them.

A key is alive over one stretch of queries, its own position to its last: so every tile of neighboring queries finds
its keys without looking at the others. Those alive for the whole tile need no mask: global ones, mostly.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.gathered_batches import BATCH_PAIRS, BATCH_ROWS, Batch
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind

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
        document, ordinal = rows.document.numpy().astype(np.int64), rows.ordinal().numpy()
        row = np.argsort(ordinal, kind="stable")
        row = row[np.searchsorted(document[row], 0) :]
        return _InLine(row, document[row], ordinal[row])


@dataclass(frozen=True, slots=True, eq=False)
class _Tasks:
    """Pairs of a KV head and a tile, `number` = head * tiles + tile, each with keys alive for some of the tile's rows.

    The keys are key[begin:end]; key[begin:middle] are alive for all rows, and as many as a multiple of KEYS_ALIKE.
    """

    number: np.ndarray
    key: np.ndarray
    begin: np.ndarray
    middle: np.ndarray
    end: np.ndarray


class _Tiles:
    """Tiles of the queries in line, and of each key of each KV head the tiles that it is alive for: first to stop."""

    def __init__(self, plan: Plan, kv_heads: int, queries: _InLine, keys: _InLine, last: np.ndarray) -> None:
        self.plan, self.kv_heads, self.queries, self.keys, self.last = plan, kv_heads, queries, keys, last
        self.group, self.count = plan.heads // kv_heads, -(-len(queries.row) // TILE)
        self.rows = np.minimum(len(queries.row) - np.arange(self.count) * TILE, TILE)
        self.low = queries.ordinal[::TILE]
        self.high = queries.ordinal[np.cumsum(self.rows) - 1]
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

    def tasks(self, start: int, stop: int) -> _Tasks:
        """Return the tasks of tiles [start, stop) that have keys."""
        first, over = np.clip(self.first, start, stop), np.clip(self.stop, start, stop)
        sizes = (over - first).flatten()
        entry = np.repeat(np.arange(sizes.size), sizes)
        tile = np.arange(len(entry)) - np.repeat(np.cumsum(sizes) - sizes - first.flatten(), sizes)
        head, key = np.divmod(entry, len(self.keys.row))
        whole = (self.keys.ordinal[key] <= self.low[tile]) & (self.last[head, key] >= self.high[tile])
        number = head * self.count + tile
        order = np.argsort(number * 2 + ~whole, kind="stable")
        number, key = number[order], key[order]
        begin = np.flatnonzero(np.diff(number, prepend=-1))
        end = np.append(begin[1:], len(number))[: len(begin)]
        alike = np.diff(np.cumsum(whole[order])[end - 1], prepend=0) // KEYS_ALIKE * KEYS_ALIKE
        return _Tasks(number[begin], key, begin, begin + alike, end)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of tiles [start, stop)."""
        tasks = self.tasks(start, stop)
        rows = self.rows[tasks.number % self.count]
        for low, high, kind in ((tasks.begin, tasks.middle, Kind.FULL), (tasks.middle, tasks.end, Kind.MASKED)):
            width = -(-(high - low) // KEYS_ALIKE) * KEYS_ALIKE
            for num_rows, num_keys, alike in _alike(rows, width):
                places = low[alike, None] + np.arange(num_keys)
                present = places < high[alike, None]
                key = tasks.key[np.minimum(places, high[alike, None] - 1)]
                limit = BATCH_ROWS if kind is Kind.FULL else BATCH_PAIRS // (num_rows * self.group)
                at_once = max(limit // num_keys, 1)
                for part in (slice(nth, nth + at_once) for nth in range(0, len(alike), at_once)):
                    yield self._batch(kind, tasks.number[alike[part]], num_rows, key[part], present[part])

    def _batch(self, kind: Kind, number: np.ndarray, rows: int, key: np.ndarray, present: np.ndarray) -> Batch:
        """Return the batch of the tasks `number` `[n]`, of as many rows each, and keys `[n, S]`, those `present`."""
        head, tile = np.divmod(number[:, None], self.count)
        place = tile * TILE + np.arange(rows)
        query_head = np.tile(np.arange(self.group), rows) + head * self.group
        row = np.repeat(self.queries.row[place], self.group, axis=1)
        queries = torch.from_numpy(row * self.plan.heads + query_head)
        keys = torch.from_numpy(self.keys.row[key] * self.kv_heads + head)
        if kind is Kind.FULL:
            return Batch(kind, queries, keys)
        query, born, last = self.queries.ordinal[place][:, :, None], self.keys.ordinal[key], self.last[head, key]
        alive = (born[:, None] <= query) & (query <= last[:, None]) & present[:, None]
        return Batch(kind, queries, keys, torch.from_numpy(np.repeat(alive, self.group, axis=1)))


def _alike(rows: np.ndarray, width: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the shapes (rows, keys) of tasks that have keys, and the tasks of each."""
    some = np.flatnonzero(width)
    shape = rows[some] << 32 | width[some]
    for number in np.unique(shape).tolist():
        yield number >> 32, number & 0xFFFFFFFF, some[shape == number]
