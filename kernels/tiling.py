"""Tiling: rows cut into tiles of one size, in the order given or gathered by a number that some of them share."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.bounds import Bounds
from farspan.kernels.rows import Rows
from farspan.kernels.visibility import Visibility


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tiling:
    """Tiles of `size` rows.

    index: int64 `[tiles * size]`, the row at each place, -1 where there is none. in_order: whether row t * size + i is
    at place i of tile t. number: int64 `[tiles]`, what the rows of a tile share; None where they were not cut by number.
    rows: what is known of the row at each place.
    """

    size: int
    index: np.ndarray
    in_order: bool
    number: np.ndarray | None
    rows: Rows

    @staticmethod
    def of(rows: Rows, size: int, number: Tensor | None = None) -> "Tiling":
        """Cut `rows` into tiles, so that all rows of a tile share one `number` (int64 `[rows]`), if it is given.

        Rows stay in order if their numbers allow it, the tiles of each number one after another; else they are sorted
        by number, and those with -1 left out.
        """
        tiles = -(-len(rows) // size)
        index = np.full(tiles * size, -1, dtype=np.int64)
        index[: len(rows)] = np.arange(len(rows))
        if number is None:
            return Tiling(size=size, index=index, in_order=True, number=None, rows=rows.take(torch.from_numpy(index)))
        numbers = number.masked_fill(rows.document < 0, -1).numpy()
        placed = np.append(numbers, -1)[index].reshape(tiles, size)
        shared = placed.max(axis=1, initial=-1)
        present = shared[shared >= 0]
        once = np.count_nonzero(np.diff(present, prepend=-1)) == len(np.unique(present))
        in_order = once and bool(((placed < 0) | (placed == shared[:, None])).all())
        if not in_order:
            index, shared = _gather(numbers, size)
        return Tiling(size=size, index=index, in_order=in_order, number=shared, rows=rows.take(torch.from_numpy(index)))

    def __len__(self) -> int:
        return len(self.index) // self.size

    def bounds(self, visibility: Visibility, lifetime: np.ndarray | None = None, tiles: int = 1) -> Bounds:
        """Return the bounds of groups of `tiles` tiles; `lifetime` is of each row, in the order before tiling."""
        starts = np.arange(0, len(self.index), self.size * tiles)
        stops = np.minimum(starts + self.size * tiles, len(self.index))
        placed = None if lifetime is None else np.append(lifetime, -1)[self.index]
        return Bounds.of(self.rows, starts, stops, visibility, placed)

    def of_number(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the last tile plus 1 of each of `count` numbers, int64 `[count]`; 0, 0 for absent ones."""
        assert self.number is not None
        present = np.flatnonzero(self.number >= 0)
        first, stop = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        # Written backwards, so that the first tile of a number is what stays.
        first[self.number[present[::-1]]] = present[::-1]
        stop[self.number[present]] = present + 1
        return first, stop


def _gather(numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of rows sorted by number, each number's rows filling up tiles of their own, and their numbers."""
    order = np.argsort(numbers, kind="stable")
    order = order[np.searchsorted(numbers[order], 0) :]
    present, first, count = np.unique(numbers[order], return_index=True, return_counts=True)
    tiles = -(-count // size)
    start = (np.cumsum(tiles) - tiles) * size
    index = np.full(tiles.sum() * size, -1, dtype=np.int64)
    index[np.arange(len(order)) + np.repeat(start - first, count)] = order
    return index, np.repeat(present, tiles)
