"""Bounds: what is known of groups of rows without looking at each, enough to rule pairs of groups out or in."""

from dataclasses import dataclass

import numpy as np
import torch

from farspan.kernels.rows import Rows
from farspan.kernels.visibility import Visibility


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bounds:
    """Least and greatest values over the rows of each group that are not padding; int64 `[groups]`.

    A group of padding only has its least values above its greatest, so that it sees nothing and is seen by nothing.
    padded: whether some row is padding. reach: least first, greatest first, least last and greatest last coordinate of
    the queries' neighbourhoods; place: least and greatest coordinate of the keys; int64 `[4 or 2, groups, dimensions]`.
    """

    position_low: np.ndarray
    position_high: np.ndarray
    document_low: np.ndarray
    document_high: np.ndarray
    padded: np.ndarray
    reach: np.ndarray | None = None
    place: np.ndarray | None = None

    @staticmethod
    def of(rows: Rows, starts: np.ndarray, stops: np.ndarray, visibility: Visibility) -> "Bounds":
        """Return the bounds of groups [start, stop) of `rows`, none of them empty."""
        real = (rows.document >= 0).numpy()

        def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            values = values.astype(np.int64)
            absent = ~real.reshape(-1, *[1] * (values.ndim - 1))
            low = np.where(absent, np.iinfo(np.int64).max // 4, values)
            high = np.where(absent, np.iinfo(np.int64).min // 4, values)
            return _reduce(np.minimum, low, starts, stops), _reduce(np.maximum, high, starts, stops)

        position_low, position_high = extremes(rows.position.numpy())
        document_low, document_high = extremes(rows.document.numpy())
        reach = place = None
        if visibility.neighbourhood is not None:
            first, last = (torch.stack(x, dim=1).numpy() for x in visibility.neighbourhood.intervals(rows.position))
            coordinates = torch.stack(visibility.neighbourhood.coordinates(rows.position), dim=1).numpy()
            reach, place = np.stack((*extremes(first), *extremes(last))), np.stack(extremes(coordinates))
        return Bounds(
            position_low=position_low,
            position_high=position_high,
            document_low=document_low,
            document_high=document_high,
            padded=~_reduce(np.logical_and, real, starts, stops),
            reach=reach,
            place=place,
        )

    def __len__(self) -> int:
        return len(self.position_low)

    def take(self, index: np.ndarray) -> "Bounds":
        """Return the bounds of the groups at `index`."""
        return Bounds(
            position_low=self.position_low[index],
            position_high=self.position_high[index],
            document_low=self.document_low[index],
            document_high=self.document_high[index],
            padded=self.padded[index],
            reach=None if self.reach is None else self.reach[:, index],
            place=None if self.place is None else self.place[:, index],
        )


def _reduce(function: np.ufunc, values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Reduce each [start, stop) of the first dimension; groups ascend and do not overlap."""
    if len(starts) == 0:
        return values[:0]
    # reduceat works from border to border; what it finds between a stop and the next start is dropped.
    borders = np.stack((starts, stops), axis=1).reshape(-1)
    padded = np.concatenate((values, values[-1:]))
    return function.reduceat(padded, borders, axis=0)[::2]


def may_see(queries: Bounds, keys: Bounds, visibility: Visibility) -> np.ndarray:
    """Return for each pair (queries[i], keys[i]) whether the bounds leave room for a visible pair of rows."""
    may = (queries.document_low <= keys.document_high) & (keys.document_low <= queries.document_high)
    if visibility.causal:
        may &= queries.position_high >= keys.position_low
    if visibility.window is not None:
        near = queries.position_low - keys.position_high < visibility.window
        near &= keys.position_low - queries.position_high < visibility.window
        may &= near | (keys.position_low < visibility.sinks)
    if queries.reach is not None and keys.place is not None:
        may &= ((queries.reach[0] <= keys.place[1]) & (keys.place[0] <= queries.reach[3])).all(axis=1)
    return may


def all_see(queries: Bounds, keys: Bounds, visibility: Visibility) -> np.ndarray:
    """Return for each pair (queries[i], keys[i]) whether the bounds prove every pair of rows visible."""
    sees = ~queries.padded & ~keys.padded
    sees &= (queries.document_low == queries.document_high) & (keys.document_low == keys.document_high)
    sees &= queries.document_low == keys.document_low
    nearest, farthest = queries.position_low - keys.position_high, queries.position_high - keys.position_low
    if visibility.causal:
        sees &= nearest >= 0
    if visibility.window is not None:
        near = np.maximum(np.abs(nearest), np.abs(farthest)) < visibility.window
        sees &= near | (keys.position_high < visibility.sinks)
    if queries.reach is not None and keys.place is not None:
        assert visibility.neighbourhood is not None
        sees &= ((queries.reach[1] <= keys.place[0]) & (keys.place[1] <= queries.reach[2])).all(axis=1)
        if any(dimension.dilation > 1 for dimension in visibility.neighbourhood.dimensions):
            sees[:] = False
    return sees
