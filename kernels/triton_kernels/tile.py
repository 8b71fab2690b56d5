# pyright: reportMissingImports=false
"""Arguments of kernels as tuples, and device functions: walk a list of the block mask, load rows, evaluate the mask.

In such a tuple None is an absent term, and a `constexpr` is compiled in.

Names in kernels: `i_` program and loop indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` blocks of values.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.triton_kernels import block_mask
from farspan.kernels.triton_kernels.mask_terms import MaskTerms

COUNT_BITS = tl.constexpr(block_mask.COUNT_BITS)
MAX_COUNT = tl.constexpr(block_mask.MAX_COUNT)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class KernelPlan(NamedTuple):
    """A plan as kernels take it: the mask, and the lists of the stationary tiles, of which there are num_tiles.

    num_launched: those that programs of this launch take, all or some of them. q_index, k_index: int32
    `[tiles * size]`, the rows in query and key tiles, None if in order. constexpr: heads, kv_heads.
    """

    q_index: Tensor | None
    k_index: Tensor | None
    terms: MaskTerms
    lists: block_mask.BlockMask
    num_queries: int
    num_keys: int
    num_tiles: int
    num_launched: int
    heads: Any
    kv_heads: Any


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


@triton.jit
def first_tile(lists, i_list):
    """Return (tiles to visit, offset of their first run, first tile, tiles that remain in the run) of half a list."""
    o_run = tl.load(lists.offsets + i_list)
    run = tl.load(lists.runs + o_run)
    return tl.load(lists.counts + i_list), o_run, run >> COUNT_BITS, run & MAX_COUNT


@triton.jit
def next_tile(lists, o_run, i_tile, remaining):
    """Return (offset of the run, tile, tiles that remain in the run) of the next visit."""
    # One flat loop over tiles, not a loop over runs around one over their tiles: only a flat loop gets pipelined. The
    # next run is therefore loaded at every step, and used where the last one has ended.
    is_last = remaining == 1
    o_run += is_last.to(tl.int32)
    run = tl.load(lists.runs + o_run)
    return (
        o_run,
        tl.where(is_last, run >> COUNT_BITS, i_tile + 1),
        tl.where(is_last, run & MAX_COUNT, remaining - 1),
    )


@triton.jit
def tile_rows(index, i_tile, num_rows, BLOCK: tl.constexpr):
    """Return (rows of a tile `[BLOCK]`, which of them exist); a row that does not is row 0."""
    o_row = i_tile * BLOCK + tl.arange(0, BLOCK)
    if index is None:
        m_row = o_row < num_rows
    else:
        o_row = tl.load(index + o_row)
        m_row = o_row >= 0
    return tl.where(m_row, o_row, 0), m_row


@triton.jit
def query_rows(plan, i_tile, i_head, BLOCK: tl.constexpr):
    """Return (rows, heads, which of them exist), each `[BLOCK]`, of a tile of queries."""
    o_row, m_row = tile_rows(plan.q_index, i_tile, plan.num_queries, BLOCK)
    return o_row, tl.zeros_like(o_row) + i_head, m_row


@triton.jit
def load_queries(x, queries):
    """Return rows of an operand `[BLOCK, padded width]`, 0 for those that do not exist."""
    o_row, o_head, m_row = queries
    o_column = tl.arange(0, x.padded)
    o_start = o_row.to(tl.int64) * x.row_stride + o_head.to(tl.int64) * x.head_stride
    mask = m_row[:, None]
    if x.padded != x.width:
        mask = mask & (o_column < x.width)[None, :]
    return tl.load(x.pointer + o_start[:, None] + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(x, plan, i_tile, i_head, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    """Return a tile of keys or values `[BLOCK, padded width]`; only a SHORT tile may lack rows, which are 0."""
    o_column = tl.arange(0, x.padded)
    p_base = x.pointer + tl.cast(i_head, tl.int64) * x.head_stride
    if plan.k_index is None:
        # The tile's start is one int64 scalar; offsets inside a tile fit int32 and cost half the registers.
        o_nth = tl.arange(0, BLOCK)
        m_row = i_tile * BLOCK + o_nth < plan.num_keys
        p_start = p_base + tl.cast(i_tile * BLOCK, tl.int64) * x.row_stride
        pointers = p_start + (o_nth[:, None] * x.row_stride + o_column[None, :])
    else:
        o_row, m_row = tile_rows(plan.k_index, i_tile, plan.num_keys, BLOCK)
        pointers = p_base + (o_row.to(tl.int64) * x.row_stride)[:, None] + o_column[None, :]
    # Full tiles of the padded width need no mask, and load faster without one.
    if SHORT:
        b_rows = tl.load(pointers, mask=m_row[:, None] & (o_column < x.width)[None, :], other=0.0)
    elif x.padded != x.width:
        b_rows = tl.load(pointers, mask=(o_column < x.width)[None, :], other=0.0)
    else:
        b_rows = tl.load(pointers)
    return b_rows


@triton.jit
def load_rows(result, o_result, m_row, like):
    """Return rows `[BLOCK, padded width]` of a float32 result as wide as `like`; those that do not exist are 0."""
    o_column = tl.arange(0, like.padded)
    pointers = result + o_result[:, None] * like.width + o_column[None, :]
    return tl.load(pointers, mask=m_row[:, None] & (o_column < like.width)[None, :], other=0.0)


@triton.jit
def store_rows(result, b_rows, o_result, m_row, like):
    """Write rows `[BLOCK, padded width]` to float32 rows as wide as `like`; nobody else writes to these."""
    o_column = tl.arange(0, like.padded)
    pointers = result + o_result[:, None] * like.width + o_column[None, :]
    tl.store(pointers, b_rows, mask=m_row[:, None] & (o_column < like.width)[None, :])


@triton.jit
def evaluate_mask(plan, queries, keys, i_kv_head, KEYS_FIRST: tl.constexpr):
    """Return which queries attend to which keys, `[queries, keys]` or, with KEYS_FIRST, `[keys, queries]`."""
    o_query, o_head, m_query = queries
    o_key, m_key = keys
    if KEYS_FIRST:
        o_query, o_head, m_query = o_query[None, :], o_head[None, :], m_query[None, :]
        o_key, m_key = o_key[:, None], m_key[:, None]
    else:
        o_query, o_head, m_query = o_query[:, None], o_head[:, None], m_query[:, None]
        o_key, m_key = o_key[None, :], m_key[None, :]
    terms = plan.terms
    # Keys that do not exist and padding have rank -1; queries that do not exist and padding have last rank -1.
    b_rank = tl.load(terms.k_rank + o_key, mask=m_key, other=-1)
    o_window = tl.load(terms.window + o_head).to(tl.int64) * plan.num_queries + o_query
    mask = b_rank <= tl.load(terms.q_last + o_window, mask=m_query, other=-1)
    mask &= b_rank >= tl.load(terms.q_first + o_window, mask=m_query, other=0)
    if terms.q_first_sink is not None:
        m_sink = b_rank <= tl.load(terms.q_last_sink + o_query, mask=m_query, other=-1)
        m_sink &= b_rank >= tl.load(terms.q_first_sink + o_query, mask=m_query, other=0)
        mask |= m_sink
    if terms.lifetime is not None:
        p_lifetime = terms.lifetime + tl.cast(i_kv_head, tl.int64) * plan.num_keys
        b_position = tl.load(terms.q_position + o_query, mask=m_query, other=0)
        mask &= b_position <= tl.load(p_lifetime + o_key, mask=m_key, other=-1)
    if terms.k_coordinates is not None:
        # All dimensions of the grid at once: a guard bit survives where its field of coordinate - low, or of
        # high - coordinate, borrows nothing from it (mask_terms.py).
        b_key = tl.load(terms.k_coordinates + o_key, mask=m_key, other=0)
        b_above = (b_key | terms.guards) - tl.load(terms.q_low + o_query, mask=m_query, other=0)
        b_below = tl.load(terms.q_high + o_query, mask=m_query, other=0) - b_key
        mask &= (b_above & b_below & terms.guards) == terms.guards
    if terms.k_class is not None:
        b_class = tl.load(terms.q_class + o_query, mask=m_query, other=0)
        mask &= b_class == tl.load(terms.k_class + o_key, mask=m_key, other=-1)
    return mask
