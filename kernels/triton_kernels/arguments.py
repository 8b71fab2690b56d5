# pyright: reportMissingImports=false
"""Tuples that kernels take as arguments: None is an absent term, and a `constexpr` is compiled in."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.triton_kernels.block_mask import BlockMask
from farspan.kernels.triton_kernels.mask_terms import MaskTerms


class KernelPlan(NamedTuple):
    """A plan as kernels take it: the mask, and the lists of the stationary tiles, of which there are num_tiles.

    q_index, k_index: int32 `[tiles * size]`, the rows in query and key tiles, None if in order. constexpr: heads,
    kv_heads, and gathered, whether a tile of queries is rows of any heads.
    """

    q_index: Tensor | None
    k_index: Tensor | None
    terms: MaskTerms
    lists: BlockMask
    num_queries: int
    num_keys: int
    num_tiles: int
    heads: Any
    kv_heads: Any
    gathered: Any


class Operand(NamedTuple):
    """A tensor `[rows, heads, width]` whose width has stride 1; constexpr: its width, and that of its tiles."""

    pointer: Tensor
    row_stride: int
    head_stride: int
    width: Any
    padded: Any

    @staticmethod
    def of(x: Tensor) -> "Operand":
        """Return `x`, or a copy of it if its width has another stride."""
        x = x if x.stride(2) == 1 else x.contiguous()
        return Operand(x, x.stride(0), x.stride(1), tl.constexpr(x.shape[2]), tl.constexpr(padded(x.shape[2])))


def padded(width: int) -> int:
    """Return the width of a tile: a power of two that tensor cores take, at least 16."""
    return max(triton.next_power_of_2(width), 16)
