"""Shapes: rows of a tile, warps and pipeline stages, by kernel, head sizes and dtype."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """Rows of a tile of queries and of keys, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The shape of each kernel; dkv is key-stationary, so its queries are the side that changes at every step."""

    forward: Shape
    dq: Shape
    dkv: Shape
    dkv_in_turn: bool = False
    """dk first, then dv, each with scores of its own: registers do not hold both sums of heads this wide."""


def shapes_for(width: int, value_width: int, dtype: torch.dtype) -> Shapes:
    """Return the shapes for head sizes of queries and keys, and of values, up to MAX_WIDTH."""
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    return next(shapes for limits, shapes in table.items() if width <= limits[0] and value_width <= limits[1])


MAX_WIDTH = 256
# Found by compiling for an H100 (docs/kernels_sm90.md): large tiles whose registers do not spill for any kind of plan,
# in bfloat16 and in float16. The stationary side has 64 rows for each of two groups of 4 warps: with fewer, both
# groups compute the same scores. With three stages two loads are in flight during a step; with two, none is
# (docs/log.md). Keyed by the largest (head size, value head size). No timings yet.
_HALF = {
    (64, 64): Shapes(forward=Shape(128, 64, 8, 3), dq=Shape(128, 64, 8, 3), dkv=Shape(64, 128, 8, 3)),
    (128, 128): Shapes(forward=Shape(128, 64, 8, 3), dq=Shape(128, 64, 8, 3), dkv=Shape(32, 128, 8, 3)),
    (256, 128): Shapes(
        forward=Shape(128, 64, 8, 3), dq=Shape(128, 32, 8, 3), dkv=Shape(32, 128, 8, 3), dkv_in_turn=True
    ),
    (256, 256): Shapes(
        forward=Shape(128, 32, 8, 3), dq=Shape(128, 32, 8, 3), dkv=Shape(16, 128, 8, 3), dkv_in_turn=True
    ),
}
# Exact float32 products run on ordinary cores, from registers: for checks, not for speed.
_FLOAT32 = {
    (64, 64): Shapes(forward=Shape(32, 16, 4, 1), dq=Shape(16, 32, 4, 1), dkv=Shape(16, 16, 4, 1)),
    (256, 256): Shapes(forward=Shape(16, 16, 8, 2), dq=Shape(16, 16, 8, 2), dkv=Shape(16, 16, 8, 2), dkv_in_turn=True),
}
