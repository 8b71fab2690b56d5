"""Bounds: what is known of groups of rows without looking at each, enough to rule pairs of groups out or in."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows

Array: TypeAlias = Any
"""A numpy array; or a tensor, where bounds are compared on a device."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bounds:
    """Least and greatest values over the rows of each group that are not padding; int64 `[groups]`.

    A group of padding only has its least values above its greatest, so that it sees nothing and is seen by nothing.
    padded: whether some row is padding. reach: least first, greatest first, least last and greatest last coordinate of
    the queries' neighborhoods; place: least and greatest coordinate of the keys; int64 `[4 or 2, groups, dimensions]`.
    lifetime: least and greatest lifetime of the keys, int64 `[2, groups]`; None where keys live forever.
    """

    position_low: Array
    position_high: Array
    document_low: Array
    document_high: Array
    padded: Array
    reach: Array | None = None
    place: Array | None = None
    lifetime: Array | None = None

    @staticmethod
    def of(
        rows: Rows,
        starts: np.ndarray,
        stops: np.ndarray,
        attention_mask: AttentionMask,
        lifetime: np.ndarray | None = None,
    ) -> "Bounds":
        """Return the bounds of groups [start, stop) of `rows`, none of them empty; `lifetime` is of each row."""
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
        if attention_mask.neighborhood is not None:
            first, last = (torch.stack(x, dim=1).numpy() for x in attention_mask.neighborhood.intervals(rows.position))
            coordinates = torch.stack(attention_mask.neighborhood.coordinates(rows.position), dim=1).numpy()
            reach, place = np.stack((*extremes(first), *extremes(last))), np.stack(extremes(coordinates))
        return Bounds(
            position_low=position_low,
            position_high=position_high,
            document_low=document_low,
            document_high=document_high,
            padded=~_reduce(np.logical_and, real, starts, stops),
            reach=reach,
            place=place,
            lifetime=None if lifetime is None else np.stack(extremes(lifetime)),
        )

    def __len__(self) -> int:
        return len(self.position_low)

    def take(self, index: Array) -> "Bounds":
        """Return the bounds of the groups at `index`."""
        return self._each(lambda values: values[..., index] if values.ndim < 3 else values[:, index])

    def to(self, device: torch.device) -> "Bounds":
        """Return the same bounds as tensors on `device`."""
        return self._each(lambda values: torch.from_numpy(values).to(device))

    def _each(self, change: Callable[[Array], Array]) -> "Bounds":
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return Bounds(**{name: None if values is None else change(values) for name, values in found.items()})


def _reduce(function: np.ufunc, values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Reduce each [start, stop) of the first dimension; groups ascend and do not overlap."""
    if len(starts) == 0:
        return values[:0]
    # reduceat works from border to border; what it finds between a stop and the next start is dropped.
    borders = np.stack((starts, stops), axis=1).reshape(-1)
    padded = np.concatenate((values, values[-1:]))
    return function.reduceat(padded, borders, axis=0)[::2]


def may_see(queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> Array:
    """Return for each pair (queries[i], keys[i]) whether the bounds leave room for a visible pair of rows."""
    may = (queries.document_low <= keys.document_high) & (keys.document_low <= queries.document_high)
    if attention_mask.causal:
        may &= queries.position_high >= keys.position_low
    if attention_mask.window is not None:
        near = queries.position_low - keys.position_high < attention_mask.window
        near &= keys.position_low - queries.position_high < attention_mask.window
        may &= near | (keys.position_low < attention_mask.sinks)
    if queries.reach is not None and keys.place is not None:
        may &= ((queries.reach[0] <= keys.place[1]) & (keys.place[0] <= queries.reach[3])).all(axis=1)
    if keys.lifetime is not None:
        may &= queries.position_low <= keys.lifetime[1]
    return may


def all_see(queries: Bounds, keys: Bounds, attention_mask: AttentionMask) -> Array:
    """Return for each pair (queries[i], keys[i]) whether the bounds prove every pair of rows visible."""
    sees = ~queries.padded & ~keys.padded
    sees &= (queries.document_low == queries.document_high) & (keys.document_low == keys.document_high)
    sees &= queries.document_low == keys.document_low
    nearest, farthest = queries.position_low - keys.position_high, queries.position_high - keys.position_low
    if attention_mask.causal:
        sees &= nearest >= 0
    if attention_mask.window is not None:
        near = (abs(nearest) < attention_mask.window) & (abs(farthest) < attention_mask.window)
        sees &= near | (keys.position_high < attention_mask.sinks)
    if queries.reach is not None and keys.place is not None:
        assert attention_mask.neighborhood is not None
        sees &= ((queries.reach[1] <= keys.place[0]) & (keys.place[1] <= queries.reach[2])).all(axis=1)
        if any(dimension.dilation > 1 for dimension in attention_mask.neighborhood.dimensions):
            sees[:] = False
    if keys.lifetime is not None:
        sees &= queries.position_high <= keys.lifetime[0]
    return sees
