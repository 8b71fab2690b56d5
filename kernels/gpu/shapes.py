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
    """Of each kernel; gathered rows take registers of their own, and queries change with every step of dkv."""

    forward: Shape
    dq: Shape
    dkv: Shape
    gathered_dkv: Shape


def shapes_for(width: int, dtype: torch.dtype) -> Shapes:
    """Return the shapes for the wider of the two head sizes."""
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    return table[min(limit for limit in table if width <= limit)]


MAX_WIDTH = 256
# Found by compiling for an H100 (docs/kernels_sm90.md): large tiles whose registers do not spill, and whose side that
# stays has 64 rows for each of two groups of 4 warps, as wgmma wants it. Where keys stay, two sums and two products are
# held at once: the wider the heads, the fewer queries at a time. No timings yet.
_HALF = {
    64: Shapes(
        forward=Shape(128, 128, 8, 2),
        dq=Shape(128, 64, 8, 3),
        dkv=Shape(64, 128, 8, 2),
        gathered_dkv=Shape(64, 128, 8, 2),
    ),
    128: Shapes(
        forward=Shape(128, 64, 8, 3),
        dq=Shape(128, 64, 8, 2),
        dkv=Shape(32, 128, 8, 2),
        gathered_dkv=Shape(64, 64, 8, 2),
    ),
    256: Shapes(
        forward=Shape(128, 32, 8, 2),
        dq=Shape(64, 32, 8, 2),
        dkv=Shape(16, 64, 8, 2),
        gathered_dkv=Shape(16, 64, 8, 2),
    ),
}
# Exact float32 products run on ordinary cores, from registers: for checks, not for speed.
_FLOAT32 = {
    64: Shapes(
        forward=Shape(32, 32, 4, 2),
        dq=Shape(32, 32, 4, 2),
        dkv=Shape(32, 32, 4, 2),
        gathered_dkv=Shape(32, 32, 4, 2),
    ),
    128: Shapes(
        forward=Shape(32, 16, 8, 2),
        dq=Shape(16, 32, 8, 2),
        dkv=Shape(16, 32, 8, 2),
        gathered_dkv=Shape(16, 32, 8, 2),
    ),
    256: Shapes(
        forward=Shape(32, 16, 8, 2),
        dq=Shape(16, 16, 8, 2),
        dkv=Shape(16, 16, 8, 2),
        gathered_dkv=Shape(16, 16, 8, 2),
    ),
}
