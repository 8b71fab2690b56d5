"""Shapes: how many rows a tile has, by kernel, head size and dtype."""

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
    forward: Shape
    dq: Shape
    dkv: Shape


def shapes_for(width: int, dtype: torch.dtype) -> Shapes:
    """Return the shapes for the wider of the two head sizes."""
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    return table[min(limit for limit in table if width <= limit)]


MAX_WIDTH = 256
_HALF = {
    64: Shapes(forward=Shape(128, 64, 4, 3), dq=Shape(128, 64, 4, 3), dkv=Shape(64, 128, 8, 3)),
    128: Shapes(forward=Shape(128, 64, 8, 3), dq=Shape(128, 64, 8, 2), dkv=Shape(64, 128, 8, 2)),
    256: Shapes(forward=Shape(64, 64, 8, 2), dq=Shape(64, 32, 8, 2), dkv=Shape(32, 64, 8, 2)),
}
_FLOAT32 = {
    64: Shapes(forward=Shape(64, 32, 4, 2), dq=Shape(64, 32, 4, 2), dkv=Shape(32, 64, 4, 2)),
    128: Shapes(forward=Shape(32, 32, 4, 2), dq=Shape(32, 32, 4, 2), dkv=Shape(32, 32, 4, 2)),
    256: Shapes(forward=Shape(32, 16, 4, 2), dq=Shape(16, 16, 4, 2), dkv=Shape(16, 16, 4, 2)),
}
