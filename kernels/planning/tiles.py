"""Tilings: rows cut into tiles of one size, in the order given or gathered by a number that some of them share."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import PADDING, Rows
from farspan.kernels.planning.bounds import Bounds
from farspan.kernels.ragged import Groups, ranges


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tiling:
    """Tiles of `size` rows.

    index: int32 `[tiles * size]`, the row at each place, -1 where there is none; None where place i holds row i.
    number: int64 `[tiles]`, the number that a tile's rows share, such as their block; None where they were not cut by
    number. rows: position and document of the row at each place; the last tile may be short where rows are in order.
    """

    size: int
    index: np.ndarray | None
    number: np.ndarray | None
    rows: Rows

    @staticmethod
    def of(rows: Rows, size: int, number: Tensor | None = None) -> "Tiling":
        """Cut `rows` into tiles; with a `number`, int64 `[rows]`, all rows of a tile share it.

        Rows stay in order where their numbers allow it, the tiles of each number one after another; else they are
        sorted by number. Rows with number -1 become padding, or are left out.
        """
        if number is None:
            return Tiling(size=size, index=None, number=None, rows=rows)
        rows = Rows(position=rows.position, document=rows.document.masked_fill(number < 0, PADDING))
        numbers = number.masked_fill(rows.document < 0, -1).numpy()
        # The number of each tile if rows stay in order: they may if every tile has one, and every number one run.
        shared = np.maximum.reduceat(numbers, np.arange(0, len(rows), size)) if len(rows) else numbers
        present = shared[shared >= 0]
        in_order = np.count_nonzero(np.diff(present, prepend=-1)) == len(np.unique(present))
        if in_order and ((numbers < 0) | (numbers == shared.repeat(size)[: len(rows)])).all():
            return Tiling(size=size, index=None, number=shared, rows=rows)
        index, shared = _gather(numbers, size)
        return Tiling(size=size, index=index, number=shared, rows=rows.take(torch.from_numpy(index).long()))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def bounds(self, attention_mask: AttentionMask, tiles: int = 1) -> Bounds:
        """Bounds of groups of `tiles` tiles; a short tile counts as padded."""
        starts = np.arange(0, len(self.rows), self.size * tiles)
        stops = np.minimum(starts + self.size * tiles, len(self.rows))
        bounds = Bounds.of(self.rows, starts, stops, attention_mask)
        if len(self.rows) % self.size:
            bounds.padded[-1] = True
        return bounds

    def of_number(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first tile of each of `count` numbers, and the last plus 1, int64 `[count]`; 0, 0 if absent."""
        assert self.number is not None
        present = np.flatnonzero(self.number >= 0)
        first, stop = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        # Assigned backwards: of several tiles with one number the last write, the first tile, remains.
        first[self.number[present[::-1]]] = present[::-1]
        stop[self.number[present]] = present + 1
        return first, stop


def _gather(numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of rows sorted by number, and the number of each tile; each number starts a new tile."""
    groups = Groups.by(numbers)
    tiles = -(-groups.sizes() // size)
    start = (np.cumsum(tiles) - tiles) * size
    index = np.full(tiles.sum() * size, -1, dtype=np.int32)
    index[ranges(start, start + groups.sizes())] = groups.member
    return index, np.repeat(groups.number, tiles)
