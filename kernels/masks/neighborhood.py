"""Neighborhood attention on a grid: the keys that a query attends to, an interval in each dimension.

NATTEN (arXiv 2204.07143), dilation (arXiv 2209.15001), stride (generalized neighborhood attention, arXiv 2504.16922).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One dimension of the grid.

    length: tokens. window: keys that a query attends to; an even one has one key more before its center than after it.
    stride: neighboring queries that share one window; 1 is plain neighborhood attention, `window` is blocked attention.
    dilation: distance between the keys of a window. causal: keys after the query are hidden.
    Raises ValueError where a window does not fit or a value is below 1.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.window < 1 or self.dilation < 1:
            raise ValueError(
                f"grid length={self.length}, window={self.window} and dilation={self.dilation} must be at least 1"
            )
        if self.window * self.dilation > self.length:
            raise ValueError(f"window={self.window} x dilation={self.dilation} must fit into grid length={self.length}")
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"stride={self.stride} must be from 1 to window={self.window}")

    def interval(self, coordinate: Tensor) -> tuple[Tensor, Tensor]:
        """The first and last key coordinate of each query coordinate's window; those between are `dilation` apart.

        Away from the borders, a window is centered at the leader of its stride group; at a border it moves inwards and
        keeps its size. Causal windows end at the query and shrink at the border.
        """
        # With dilation, tokens of equal remainder form a dimension of their own: x, of `length` tokens.
        group, x = coordinate % self.dilation, coordinate // self.dilation
        length = self.length // self.dilation + (group < self.length % self.dilation).to(x.dtype)
        first_of_group = x // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(first_of_group + self.stride - 1, length - 1)
            low, high = (leader - self.window + 1).clamp(min=0), x
        else:
            # The leader is the middle of the stride group (GNA, 2504.16922); its window is clamped to the grid.
            leader = torch.minimum(first_of_group + self.stride // 2, length - 1)
            before = self.window // 2
            after = self.window - 1 - before
            center = torch.minimum(leader.clamp(min=before), length - 1 - after)
            low, high = center - before, center + after
        return low * self.dilation + group, high * self.dilation + group


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighborhood:
    """A grid in row-major order; a document is one grid, or several in sequence that do not attend to each other."""

    dimensions: tuple[Dimension, ...]

    def __post_init__(self) -> None:
        if not self.dimensions:
            raise ValueError("a neighborhood needs at least one dimension")

    @property
    def tokens(self) -> int:
        """Tokens of one grid."""
        return math.prod(dimension.length for dimension in self.dimensions)

    def coordinates(self, position: Tensor) -> list[Tensor]:
        """The number of the grid in its document, then the coordinate along each dimension."""
        rest, coordinates = position, []
        for dimension in reversed(self.dimensions):  # row-major: the last dimension is the fastest
            coordinates.append(rest % dimension.length)
            rest = rest // dimension.length
        return [rest, *reversed(coordinates)]

    def intervals(self, position: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The lowest and the highest coordinates in each query's neighborhood, grid and dimensions."""
        grid, *coordinates = self.coordinates(position)
        intervals = [d.interval(coordinate) for d, coordinate in zip(self.dimensions, coordinates, strict=True)]
        return [grid, *(low for low, _ in intervals)], [grid, *(high for _, high in intervals)]

    def mask_mod(self, position: Tensor, key_position: Tensor) -> Tensor:
        """Whether keys lie in the neighborhoods of queries of the same document, broadcast together."""
        lows, highs = self.intervals(position)
        grid, *coordinates = self.coordinates(key_position)
        visible = grid == lows[0]
        for dimension, key, low, high in zip(self.dimensions, coordinates, lows[1:], highs[1:], strict=True):
            visible &= (key >= low) & (key <= high)
            if dimension.dilation > 1:
                visible &= (key - low) % dimension.dilation == 0
        return visible
