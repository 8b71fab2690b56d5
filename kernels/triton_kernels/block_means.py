# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
"""Kernels that sum the rows of each block, and make its mean or its self-similarity of the sums."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Members(NamedTuple):
    """Rows of each block, one block after another: int32 `order` `[rows]`, `offsets` `[blocks + 1]`."""

    order: Tensor
    offsets: Tensor


class Shift(NamedTuple):
    """The mean of each block's document, to subtract: sums float64 `[documents, heads, width]`, and what they are of.

    counts: float64 `[documents]`. document: of each block, int32 `[blocks]`.
    """

    sums: Tensor
    counts: Tensor
    document: Tensor


@triton.jit
def sums_kernel(
    sums, x, members, weight, shift, num_blocks,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
    PLAIN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sum the rows of each block, float64 `[kinds, blocks, HEADS, WIDTH]`.

    PLAIN: as they are. UNIT: scaled to length one. Both are two kinds.
    """
    i_block, i_head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    start, stop = tl.load(members.offsets + i_block), tl.load(members.offsets + i_block + 1)
    o_column = tl.arange(0, PADDED)
    m_column = o_column < WIDTH
    p_column = x.pointer + tl.cast(i_head, tl.int64) * x.head_stride + o_column.to(tl.int64) * x.column_stride
    if shift is not None:
        i_document = tl.load(shift.document + i_block)
        p_shift = shift.sums + (i_document * HEADS + i_head).to(tl.int64) * WIDTH + o_column
        b_shift = tl.load(p_shift, mask=m_column, other=0.0) / tl.load(shift.counts + i_document)
        b_shift = b_shift.to(tl.float32).to(x.pointer.dtype.element_ty).to(tl.float32)
    b_plain = tl.zeros([ROWS, PADDED], tl.float64)
    b_unit = tl.zeros([ROWS, PADDED], tl.float64)
    for i_row in range(start, stop, ROWS):
        o_nth = i_row + tl.arange(0, ROWS)
        m_row = o_nth < stop
        o_row = tl.load(members.order + o_nth, mask=m_row, other=0)
        mask = m_row[:, None] & m_column[None, :]
        # [ROWS, PADDED]
        b_x = tl.load(p_column[None, :] + o_row.to(tl.int64)[:, None] * x.row_stride, mask=mask, other=0.0)
        b_x = b_x.to(tl.float32)
        if shift is not None:
            # Rounded to the dtype of x, as the difference of two of its tensors is.
            b_x = tl.where(mask, (b_x - b_shift[None, :]).to(x.pointer.dtype.element_ty).to(tl.float32), 0.0)
        b_x = b_x.to(tl.float64)
        if weight is not None:
            b_x *= tl.load(weight + o_row, mask=m_row, other=0.0)[:, None]
        if PLAIN:
            b_plain += b_x
        if UNIT:
            b_norm = tl.sqrt(tl.sum(b_x * b_x, axis=1))
            b_unit += b_x / tl.where(b_norm == 0, 1.0, b_norm)[:, None]
    p_sum = sums + (tl.cast(i_block, tl.int64) * HEADS + i_head) * WIDTH + o_column
    if PLAIN:
        tl.store(p_sum, tl.sum(b_plain, axis=0), mask=m_column)
        p_sum += tl.cast(num_blocks, tl.int64) * HEADS * WIDTH
    if UNIT:
        tl.store(p_sum, tl.sum(b_unit, axis=0), mask=m_column)


@triton.jit
def _sums_of_blocks(sums, counts, which, num_blocks, HEADS, WIDTH, PADDED: tl.constexpr, BLOCKS: tl.constexpr):
    """Return (sums `[BLOCKS, PADDED]`, counts, indices, which of them exist) of some blocks of `which` and a head."""
    i_part, i_head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    o_nth = i_part * BLOCKS + tl.arange(0, BLOCKS)
    m_block = o_nth < num_blocks
    o_block = o_nth if which is None else tl.load(which + o_nth, mask=m_block, other=0)
    o_column = tl.arange(0, PADDED)
    p_sum = sums + ((o_block * HEADS + i_head).to(tl.int64) * WIDTH)[:, None] + o_column[None, :]
    b_sums = tl.load(p_sum, mask=m_block[:, None] & (o_column < WIDTH)[None, :], other=0.0)
    # An empty block has a sum of 0.
    return b_sums, tl.maximum(tl.load(counts + o_block, mask=m_block, other=1.0), 1.0), o_nth, m_block


@triton.jit
def means_kernel(
    means, sums, counts, which, num_blocks,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the means of the blocks `which`, None for all: float64 `[HEADS, WIDTH, blocks]`, rounded to float32.

    sums: `[all blocks, HEADS, WIDTH]`.
    """
    b_sums, b_count, o_nth, m_block = _sums_of_blocks(sums, counts, which, num_blocks, HEADS, WIDTH, PADDED, BLOCKS)
    o_column = tl.arange(0, PADDED)
    p_column = means + (tl.program_id(0) % HEADS * WIDTH + o_column).to(tl.int64) * num_blocks
    b_means = (b_sums / b_count[:, None]).to(tl.float32).to(tl.float64)
    mask = m_block[:, None] & (o_column < WIDTH)[None, :]
    tl.store(p_column[None, :] + o_nth[:, None], b_means, mask=mask)


@triton.jit
def similar_kernel(
    similar, sums, counts, which, num_blocks, threshold,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write whether the mean cosine of all pairs of a block's rows exceeds the threshold, int8 `[HEADS, blocks]`.

    It is the square of the sum of the rows scaled to length one. sums: of these, `[all blocks, HEADS, WIDTH]`.
    """
    b_sums, b_count, o_nth, m_block = _sums_of_blocks(sums, counts, which, num_blocks, HEADS, WIDTH, PADDED, BLOCKS)
    b_cosine = (tl.sum(b_sums * b_sums, axis=1) / (b_count * b_count)).to(tl.float32)
    p_similar = similar + (tl.program_id(0) % HEADS).to(tl.int64) * num_blocks + o_nth
    tl.store(p_similar, (b_cosine > threshold).to(tl.int8), mask=m_block)
