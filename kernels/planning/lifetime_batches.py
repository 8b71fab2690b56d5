"""A plan with lifetimes (KV eviction) turned into batches of gathered tiles of query rows and their active keys.

A key is active for the queries from its own position to its last one, an interval in document order: so each tile of
neighboring queries finds its keys without looking at the others. Keys active for the whole tile, mostly global ones,
need no mask:

    queries, tiles of 3    0 1 2 | 3 4 5 | 6 7 8
    key 1, lifetime 4        x x | x x   |           tiles 0 and 1, both under a mask
    key 2, lifetime 8          x | x x x | x x x     tile 0 under a mask; tiles 1 and 2 in full
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning.gathered_batches import BATCH_PAIRS, BATCH_ROWS, Batch
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind
from farspan.kernels.ragged import Groups, chunks_by_budget, group_equal, ranges, runs

TILE = 128
"""Query rows that share one list of keys."""
KEY_MULTIPLE = 64
"""Tiles take keys without a mask in multiples of this, so that enough tiles have one shape and share a batch."""
ENTRIES_AT_ONCE = 1 << 22
"""Pairs of a tile and a key that are listed at once, unless a single tile has more."""


def lifetime_batches(plan: Plan, kv_heads: int) -> Iterator[Batch]:
    """Yield disjoint batches that hold every visible pair of a plan with lifetimes."""
    assert plan.lifetime is not None
    assert len(plan.lifetime) == kv_heads, "every KV head has lifetimes of its own"
    queries, keys = _DocumentOrder.of(plan.queries), _DocumentOrder.of(plan.keys)
    if not len(queries.row) or not len(keys.row):
        return
    # The last query that sees each key, as an ordinal: [Hk, keys].
    last = keys.document * (1 << 32) + plan.lifetime.numpy()[:, keys.row].astype(np.int64)
    tiles = _Tiles(plan, kv_heads, queries, keys, last)
    for start, stop in chunks_by_budget(tiles.num_keys(), ENTRIES_AT_ONCE):
        yield from tiles.batches(start, stop)


@dataclass(frozen=True, slots=True, eq=False)
class _DocumentOrder:
    """Rows that are not padding, sorted by document and position; `ordinal` is the number they are sorted by."""

    row: np.ndarray
    document: np.ndarray
    ordinal: np.ndarray

    @staticmethod
    def of(rows: Rows) -> "_DocumentOrder":
        document, ordinal = rows.document.numpy().astype(np.int64), rows.ordinal().numpy()
        row = np.argsort(ordinal, kind="stable")
        row = row[np.searchsorted(document[row], 0) :]
        return _DocumentOrder(row, document[row], ordinal[row])


class _Tiles:
    """Tiles of the queries in document order, and the tiles [first, stop) each key is active for, `[Hk, keys]`."""

    def __init__(
        self, plan: Plan, kv_heads: int, queries: _DocumentOrder, keys: _DocumentOrder, last: np.ndarray
    ) -> None:
        self.plan, self.kv_heads, self.queries, self.keys, self.last = plan, kv_heads, queries, keys, last
        self.group, self.count = plan.heads // kv_heads, -(-len(queries.row) // TILE)
        self.rows = np.minimum(len(queries.row) - np.arange(self.count) * TILE, TILE)
        self.low = queries.ordinal[::TILE]
        self.high = queries.ordinal[np.cumsum(self.rows) - 1]
        self.first = np.broadcast_to(np.searchsorted(self.high, keys.ordinal), last.shape)
        self.stop = np.maximum(np.searchsorted(self.low, last, side="right"), self.first)

    def num_keys(self) -> np.ndarray:
        """Keys of each tile, all KV heads together, `[tiles]`: those begun minus those over."""
        begun, over = (np.bincount(x.flatten(), minlength=self.count + 1) for x in (self.first, self.stop))
        return np.cumsum(begun - over)[: self.count]

    def problems(self, start: int, stop: int) -> tuple[Groups, np.ndarray]:
        """The keys of each pair of a KV head and one of tiles [start, stop), its number head * tiles + tile.

        Also where the keys that need a mask start: those before, a multiple of KEY_MULTIPLE, are active for all rows.
        """
        first, over = (np.clip(x, start, stop).flatten() for x in (self.first, self.stop))  # [Hk * keys]
        entry, tile = np.repeat(np.arange(len(first)), over - first), ranges(first, over)
        head, key = np.divmod(entry, len(self.keys.row))
        full = (self.keys.ordinal[key] <= self.low[tile]) & (self.last[head, key] >= self.high[tile])
        number = head * self.count + tile
        # Within a problem, keys that need no mask come first.
        order = np.argsort(number * 2 + ~full, kind="stable")
        number, key = number[order], key[order]
        begin, end = runs(number)
        num_full = np.diff(np.cumsum(full[order])[end - 1], prepend=0)
        return Groups(number[begin], key, begin, end), begin + num_full // KEY_MULTIPLE * KEY_MULTIPLE

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of tiles [start, stop)."""
        problems, middle = self.problems(start, stop)
        rows = self.rows[problems.number % self.count]
        for low, high, kind in ((problems.start, middle, Kind.FULL), (middle, problems.stop, Kind.MASKED)):
            width = -(-(high - low) // KEY_MULTIPLE) * KEY_MULTIPLE
            some = np.flatnonzero(width)
            for same_shape in (some[nth] for nth in group_equal(rows[some] << 32 | width[some])):
                num_rows, num_keys = int(rows[same_shape[0]]), int(width[same_shape[0]])
                # [problems, S]: indices into the keys; those beyond the end repeat the last key, masked.
                index = low[same_shape, None] + np.arange(num_keys)
                present = index < high[same_shape, None]
                key = problems.member[np.minimum(index, high[same_shape, None] - 1)]
                limit = BATCH_ROWS if kind is Kind.FULL else BATCH_PAIRS // (num_rows * self.group)
                at_once = max(limit // num_keys, 1)
                for part in (slice(nth, nth + at_once) for nth in range(0, len(same_shape), at_once)):
                    yield self._batch(kind, problems.number[same_shape[part]], num_rows, key[part], present[part])

    def _batch(self, kind: Kind, number: np.ndarray, rows: int, key: np.ndarray, present: np.ndarray) -> Batch:
        """The batch of the problems `number` `[n]`, of `rows` rows each, and keys `[n, S]`, those `present`."""
        head, tile = np.divmod(number[:, None], self.count)  # [n, 1]
        index = tile * TILE + np.arange(rows)  # [n, rows]
        # The query heads of a KV head run side by side: R = rows * group, head fastest.
        query_head = np.tile(np.arange(self.group), rows) + head * self.group  # [n, R]
        row = np.repeat(self.queries.row[index], self.group, axis=1)  # [n, R]
        queries = torch.from_numpy(row * self.plan.heads + query_head)
        keys = torch.from_numpy(self.keys.row[key] * self.kv_heads + head)
        if kind is Kind.FULL:
            return Batch(kind, queries, keys)
        query, first, last = self.queries.ordinal[index][:, :, None], self.keys.ordinal[key], self.last[head, key]
        active = (first[:, None] <= query) & (query <= last[:, None]) & present[:, None]  # [n, rows, S]
        return Batch(kind, queries, keys, torch.from_numpy(np.repeat(active, self.group, axis=1)))  # [n, R, S]
