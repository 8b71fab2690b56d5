# pyright: reportMissingImports=false
"""Kernels for products of rows, sorted by expert, with the matrices of their experts.

A tile is (expert, first row, end): no row at or after the end is used or written, whatever is there. Sums are float32;
float32 is multiplied in full.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
"""Tiles of rows whose programs run side by side for all columns, so that rows and matrices are read from L2."""


@triton.jit
def _tile(tiles, num_tiles, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (expert, rows `[ROWS]`, which of them are the tile's, columns `[COLUMNS]`) of this program."""
    num_blocks = tl.cdiv(width, COLUMNS)
    i_group = tl.program_id(0) // (GROUP * num_blocks)
    i_member = tl.program_id(0) % (GROUP * num_blocks)
    size = tl.minimum(num_tiles - i_group * GROUP, GROUP)
    p_tile = tiles + (i_group * GROUP + i_member % size) * 3
    o_row = tl.load(p_tile + 1) + tl.arange(0, ROWS)
    o_column = i_member // size * COLUMNS + tl.arange(0, COLUMNS)
    return tl.load(p_tile), o_row, o_row < tl.load(p_tile + 2), o_column


@triton.jit
def _rows_at(rows, o_row, o_column):
    """Return pointers `[rows, columns]`."""
    # int64: rows x width exceeds 2^31 at a few hundred thousand tokens of 8 experts each.
    return rows.pointer + o_row.to(tl.int64)[:, None] * rows.row_stride + o_column[None, :]


@triton.jit
def _matrix_at(matrices, i_expert, o_depth, o_column):
    """Return pointers `[depth, columns]` to the matrix of an expert."""
    p_matrix = matrices.pointer + i_expert.to(tl.int64) * matrices.expert_stride
    return (
        p_matrix
        + o_depth.to(tl.int64)[:, None] * matrices.depth_stride
        + o_column.to(tl.int64)[None, :] * matrices.column_stride
    )


@triton.jit
def _multiply(b_acc, b_more, x, matrices, more, tile, width, depth, DEPTH: tl.constexpr):
    """Return b_acc plus the product of rows of x and the expert's matrix, `[ROWS, COLUMNS]`; b_more, of `more`."""
    i_expert, o_row, m_row, o_column = tile
    o_depth = tl.arange(0, DEPTH)
    p_x, p_matrix = _rows_at(x, o_row, o_depth), _matrix_at(matrices, i_expert, o_depth, o_column)
    p_more = p_matrix if more is None else _matrix_at(more, i_expert, o_depth, o_column)
    # One loop for both matrices, so that rows of x are loaded once.
    for start in range(0, depth, DEPTH):
        m_depth = o_depth < depth - start
        # [ROWS, DEPTH]; matrices [DEPTH, COLUMNS]
        b_x = tl.load(p_x, mask=m_row[:, None] & m_depth[None, :], other=0.0)
        mask = m_depth[:, None] & (o_column < width)[None, :]
        b_acc = tl.dot(b_x, tl.load(p_matrix, mask=mask, other=0.0), b_acc, input_precision="ieee")
        if more is not None:
            b_more = tl.dot(b_x, tl.load(p_more, mask=mask, other=0.0), b_more, input_precision="ieee")
            p_more += DEPTH * more.depth_stride
        p_x += DEPTH
        p_matrix += DEPTH * matrices.depth_stride
    return b_acc, b_more


@triton.jit
def _store(out, b_values, tile, width):
    _, o_row, m_row, o_column = tile
    tl.store(_rows_at(out, o_row, o_column), b_values, mask=m_row[:, None] & (o_column < width)[None, :])


@triton.jit
def product_kernel(
    out, x, matrices, y, others, tiles, num_tiles, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write x matrix, or x matrix + y other: rows `[N, width]` of x, y `[N, depth]`."""
    tile = _tile(tiles, num_tiles, width, ROWS, COLUMNS)
    b_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_acc, _ = _multiply(b_acc, b_acc, x, matrices, None, tile, width, depth, DEPTH)
    if y is not None:
        b_acc, _ = _multiply(b_acc, b_acc, y, others, None, tile, width, depth, DEPTH)
    _store(out, b_acc, tile, width)


@triton.jit
def swiglu_kernel(
    inner, x, gate, up, tiles, num_tiles, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write silu(x gate) * (x up): rows `[N, width]` of x `[N, depth]`."""
    tile = _tile(tiles, num_tiles, width, ROWS, COLUMNS)
    b_zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_gate, b_up = _multiply(b_zeros, b_zeros, x, gate, up, tile, width, depth, DEPTH)
    _store(inner, b_gate * tl.sigmoid(b_gate) * b_up, tile, width)


@triton.jit
def swiglu_backward_kernel(
    inner, dgate, dup, x, dout, gate, up, down, tiles, num_tiles, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write inner = silu(x gate) * (x up), and the gradients of x gate and of x up: rows `[N, width]`.

    dout, like x, `[N, depth]`.
    """
    tile = _tile(tiles, num_tiles, width, ROWS, COLUMNS)
    b_zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_gate, b_up = _multiply(b_zeros, b_zeros, x, gate, up, tile, width, depth, DEPTH)
    b_dinner, _ = _multiply(b_zeros, b_zeros, dout, down, None, tile, width, depth, DEPTH)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    _store(inner, b_silu * b_up, tile, width)
    _store(dup, b_dinner * b_silu, tile, width)
    # The derivative of silu is sigmoid (1 + gate (1 - sigmoid)).
    _store(dgate, b_dinner * b_up * b_sigmoid * (1 + b_gate * (1 - b_sigmoid)), tile, width)


@triton.jit
def weight_kernel(
    dweight, dout, x, experts, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write dout^T x over all rows of an expert: a matrix of `depth` columns for each of `width`; 0 without rows."""
    num_down, num_across = tl.cdiv(width, COLUMNS), tl.cdiv(depth, DEPTH)
    i_nth, i_block = tl.program_id(0) // (num_down * num_across), tl.program_id(0) % (num_down * num_across)
    o_column = i_block // num_across * COLUMNS + tl.arange(0, COLUMNS)
    o_depth = i_block % num_across * DEPTH + tl.arange(0, DEPTH)
    p_expert = experts + i_nth * 3
    i_expert, first, end = tl.load(p_expert), tl.load(p_expert + 1), tl.load(p_expert + 2)
    # One program sums over all rows of its expert: nothing is added by atomics, and the sum stays in registers.
    b_acc = tl.zeros([COLUMNS, DEPTH], tl.float32)
    o_row = first + tl.arange(0, ROWS)
    p_dout, p_x = _rows_at(dout, o_row, o_column), _rows_at(x, o_row, o_depth)
    for start in range(first, end, ROWS):
        m_row = start - first + o_row < end
        # [ROWS, COLUMNS], [ROWS, DEPTH]
        b_dout = tl.load(p_dout, mask=m_row[:, None] & (o_column < width)[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_row[:, None] & (o_depth < depth)[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_dout), b_x, b_acc, input_precision="ieee")
        p_dout += ROWS * tl.cast(dout.row_stride, tl.int64)
        p_x += ROWS * tl.cast(x.row_stride, tl.int64)
    # [DEPTH, COLUMNS] -> [COLUMNS, DEPTH]
    p_dweight = tl.trans(_matrix_at(dweight, i_expert, o_depth, o_column))
    tl.store(p_dweight, b_acc, mask=(o_column < width)[:, None] & (o_depth < depth)[None, :])
