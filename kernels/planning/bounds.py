"""Bounds of groups of rows: extremes of their positions and documents, enough to rule pairs of groups out or in.

The comparisons are conservative: `any_unmasked` may be True of a pair without a visible (query, key), and
`all_unmasked` False of a pair that is visible in full; never the other way round.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.ragged import chunks_by_budget, ranges

Array: TypeAlias = Any
"""A numpy array; or a tensor, where bounds are compared on a device."""
MAX_CANDIDATES = 1 << 20
"""Pairs of groups that are compared at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bounds:
    """Least and greatest values over the rows of each group that are not padding; int64 `[groups]`.

    A group of padding only has its least values above its greatest, so it is visible to nothing and sees nothing.
    padded: whether some row is padding. reach: least first, greatest first, least last and greatest last coordinate of
    the queries' neighborhoods; cell: least and greatest coordinate of the keys; int64 `[4 or 2, groups, dimensions]`.
    """

    position_low: Array
    position_high: Array
    document_low: Array
    document_high: Array
    padded: Array
    reach: Array | None = None
    cell: Array | None = None

    @staticmethod
    def of(rows: Rows, starts: np.ndarray, stops: np.ndarray, attention_mask: AttentionMask) -> "Bounds":
        """Bounds of groups [start, stop) of `rows`, ascending, none of them empty."""
        real = (rows.document >= 0).numpy()

        def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            values = values.astype(np.int64)
            absent = ~real.reshape(-1, *[1] * (values.ndim - 1))  # [rows] -> [rows, 1, ...]
            # A quarter of the range: differences of two bounds must not overflow.
            low = np.where(absent, np.iinfo(np.int64).max // 4, values)
            high = np.where(absent, np.iinfo(np.int64).min // 4, values)
            return _reduce(np.minimum, low, starts, stops), _reduce(np.maximum, high, starts, stops)

        position_low, position_high = extremes(rows.position.numpy())
        document_low, document_high = extremes(rows.document.numpy())
        reach = cell = None
        if attention_mask.neighborhood is not None:
            first, last = (torch.stack(x, dim=1).numpy() for x in attention_mask.neighborhood.intervals(rows.position))
            coordinates = torch.stack(attention_mask.neighborhood.coordinates(rows.position), dim=1).numpy()
            reach, cell = np.stack((*extremes(first), *extremes(last))), np.stack(extremes(coordinates))
        return Bounds(
            position_low=position_low,
            position_high=position_high,
            document_low=document_low,
            document_high=document_high,
            padded=~_reduce(np.logical_and, real, starts, stops),
            reach=reach,
            cell=cell,
        )

    def __len__(self) -> int:
        return len(self.position_low)

    def take(self, index: Array) -> "Bounds":
        """The bounds of the groups at `index`."""
        # [groups] and [2, groups], or [4, groups, dimensions]
        return self._each(lambda values: values[..., index] if values.ndim < 3 else values[:, index])

    def to(self, device: torch.device) -> "Bounds":
        """The same bounds as tensors on `device`."""
        return self._each(lambda values: torch.from_numpy(values).to(device))

    def _each(self, change: Callable[[Array], Array]) -> "Bounds":
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Bounds(**{name: None if values is None else change(values) for name, values in columns.items()})


def _reduce(function: np.ufunc, values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Reduce each [start, stop) of the first dimension; groups ascend and do not overlap."""
    if len(starts) == 0:
        return values[:0]
    # reduceat reduces between consecutive borders; results between a stop and the next start are dropped.
    borders = np.stack((starts, stops), axis=1).reshape(-1)  # [groups, 2] -> [2 groups]
    padded = np.concatenate((values, values[-1:]))
    return function.reduceat(padded, borders, axis=0)[::2]


def any_unmasked(queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> Array:
    """Whether the bounds leave room for a visible pair of rows in (queries[i], keys[i]), bool `[pairs]`."""
    possible = (queries.document_low <= keys.document_high) & (keys.document_low <= queries.document_high)
    if attention_mask.causal:
        possible &= queries.position_high >= keys.position_low
    if attention_mask.window is not None:
        near = queries.position_low - keys.position_high < attention_mask.window
        near &= keys.position_low - queries.position_high < attention_mask.window
        possible &= near | (keys.position_low < attention_mask.sinks)
    if queries.reach is not None and keys.cell is not None:
        # Least first <= greatest key, and least key <= greatest last, in each dimension.
        possible &= ((queries.reach[0] <= keys.cell[1]) & (keys.cell[0] <= queries.reach[3])).all(axis=1)
    return possible


def all_unmasked(queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> Array:
    """Whether the bounds prove every pair of rows of (queries[i], keys[i]) visible, bool `[pairs]`."""
    proven = ~queries.padded & ~keys.padded
    proven &= (queries.document_low == queries.document_high) & (keys.document_low == keys.document_high)
    proven &= queries.document_low == keys.document_low
    nearest, farthest = queries.position_low - keys.position_high, queries.position_high - keys.position_low
    if attention_mask.causal:
        proven &= nearest >= 0
    if attention_mask.window is not None:
        near = (abs(nearest) < attention_mask.window) & (abs(farthest) < attention_mask.window)
        proven &= near | (keys.position_high < attention_mask.sinks)
    if queries.reach is not None and keys.cell is not None:
        assert attention_mask.neighborhood is not None
        proven &= ((queries.reach[1] <= keys.cell[0]) & (keys.cell[1] <= queries.reach[2])).all(axis=1)
        # Dilated windows have holes that intervals do not show.
        if any(dimension.dilation > 1 for dimension in attention_mask.neighborhood.dimensions):
            proven[:] = False
    return proven


def candidate_pairs(
    queries: Bounds, keys: Bounds, attention_mask: AttentionMask
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of the pairs (query group, key group), in order, that pass `any_unmasked`.

    Sorted by document, a query's candidates are consecutive keys: time and memory follow the pairs of groups that
    share documents, not all pairs.
    """
    if not len(queries) or not len(keys):
        return
    order = np.argsort(keys.document_low, kind="stable")
    # The last document that any key so far reaches: sorted even where the keys' own highs are not.
    reach = np.maximum.accumulate(keys.document_high[order])
    first = np.searchsorted(reach, queries.document_low, side="left")
    stop = np.searchsorted(keys.document_low[order], queries.document_high, side="right")
    stop = np.maximum(stop, first)
    for begin, end in chunks_by_budget(stop - first, MAX_CANDIDATES):
        i = np.repeat(np.arange(begin, end), (stop - first)[begin:end])
        j = order[ranges(first[begin:end], stop[begin:end])]
        possible = any_unmasked(queries.take(i), keys.take(j), attention_mask)
        i, j = i[possible], j[possible]
        ascending = np.lexsort((j, i))
        yield i[ascending], j[ascending]
