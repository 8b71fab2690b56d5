"""Neighborhood attention on a grid: which keys a query sees, per dimension, as an interval.

NATTEN (arXiv 2204.07143), dilation (arXiv 2209.15001), stride (generalized neighborhood attention, arXiv 2504.16922).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One dimension of the grid.

    length: tokens. window: keys that a query sees. stride: neighboring queries that share one window; 1 is plain
    neighborhood attention, `window` is blocked attention. dilation: distance between the keys of a window. causal:
    keys after the query are hidden. An even window has one key more before its center than after it.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.window < 1 or self.dilation < 1:
            raise ValueError(f"length={self.length}, window={self.window}, dilation={self.dilation} must be at least 1")
        if self.window * self.dilation > self.length:
            raise ValueError(f"window={self.window} x dilation={self.dilation} must fit into length={self.length}")
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"stride={self.stride} must be from 1 to window={self.window}")

    def interval(self, coordinate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last key coordinate that each query coordinate sees; those between are `dilation` apart.

        Away from the borders a query sees `window` keys around the leader of its stride group; at a border the window
        moves inwards and keeps its size. Causal windows end at the query and shrink at the border.
        """
        group, x = coordinate % self.dilation, coordinate // self.dilation
        length = self.length // self.dilation + (group < self.length % self.dilation).to(x.dtype)
        first_of_group = x // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(first_of_group + self.stride - 1, length - 1)
            low, high = (leader - self.window + 1).clamp(min=0), x
        else:
            leader = torch.minimum(first_of_group + self.stride // 2, length - 1)
            before = self.window // 2
            after = self.window - 1 - before
            center = torch.minimum(leader.clamp(min=before), length - 1 - after)
            low, high = center - before, center + after
        return low * self.dilation + group, high * self.dilation + group


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighborhood:
    """A grid in row-major order; a document is one grid, or several after one another, which do not see each other."""

    dimensions: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise ValueError("a neighborhood needs at least one dimension")

    @property
    def tokens(self) -> int:
        """Tokens of one grid."""
        return math.prod(dimension.length for dimension in self.dimensions)

    def coordinates(self, position: Tensor) -> list[Tensor]:
        """Return the number of the grid in its document, then the place in it along each dimension."""
        rest, places = position, []
        for dimension in reversed(self.dimensions):
            places.append(rest % dimension.length)
            rest = rest // dimension.length
        return [rest, *reversed(places)]

    def intervals(self, position: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the lowest and the highest of the coordinates that each query sees, grid and dimensions."""
        grid, *places = self.coordinates(position)
        intervals = [d.interval(place) for d, place in zip(self.dimensions, places, strict=True)]
        return [grid, *(low for low, _ in intervals)], [grid, *(high for _, high in intervals)]

    def mask_mod(self, position: Tensor, key_position: Tensor) -> Tensor:
        """Return whether keys lie in the neighborhoods of queries of the same document, broadcast together."""
        lows, highs = self.intervals(position)
        grid, *places = self.coordinates(key_position)
        visible = grid == lows[0]
        for dimension, place, low, high in zip(self.dimensions, places, lows[1:], highs[1:], strict=True):
            visible &= (place >= low) & (place <= high)
            if dimension.dilation > 1:
                visible &= (place - low) % dimension.dilation == 0
        return visible
