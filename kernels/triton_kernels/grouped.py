# pyright: reportMissingImports=false
"""Kernels for products of rows, sorted by expert, with the matrices of their experts.

Programs find their tiles in the numbers of rows of the experts, which the host does not know. Three experts with 3, 0
and 5 rows, in tiles of 4 rows; of the programs for as many tiles as 8 rows could have, one has nothing to do:

    tile      0             1             2             3
    expert    0             2             2             -
    rows      0 to 2        3 to 6        7             -

No row of another expert is used or written, nor is one after the last expert's, whatever is there. Sums are float32;
float32 is multiplied in full.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
"""Tiles of rows whose programs run side by side for all columns, so that rows and matrices are read from L2."""


@triton.jit
def _rows_of(i_expert, counts, num_experts, EXPERTS: tl.constexpr):
    """Return the first row of an expert, and the one after its last; counts: int64 `[num_experts]`."""
    o_expert = tl.arange(0, EXPERTS)
    b_count = tl.load(counts + o_expert, mask=o_expert < num_experts, other=0).to(tl.int32)
    first = tl.sum(tl.where(o_expert < i_expert, b_count, 0))
    return first, first + tl.sum(tl.where(o_expert == i_expert, b_count, 0))


@triton.jit
def _tile(experts, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return (expert, rows `[ROWS]`, which of them are the tile's, columns `[COLUMNS]`) of this program.

    The expert is that after the last one for programs without a tile.
    """
    o_expert = tl.arange(0, EXPERTS)
    b_count = tl.load(experts.counts + o_expert, mask=o_expert < experts.number, other=0).to(tl.int32)
    m_expert = (experts.only < 0) | (o_expert == experts.only)
    b_last_tile = tl.cumsum(tl.where(m_expert, tl.cdiv(b_count, ROWS), 0), 0)
    num_tiles, num_blocks = tl.max(b_last_tile), tl.cdiv(width, COLUMNS)
    i_group = tl.program_id(0) // (GROUP * num_blocks)
    i_member = tl.program_id(0) % (GROUP * num_blocks)
    size = tl.maximum(tl.minimum(num_tiles - i_group * GROUP, GROUP), 1)
    i_tile, i_block = i_group * GROUP + i_member % size, i_member // size
    # As many experts have all of their tiles before this one.
    i_expert = tl.sum((b_last_tile <= i_tile).to(tl.int32))
    nth = i_tile - tl.max(tl.where(o_expert < i_expert, b_last_tile, 0))
    first, end = _rows_of(i_expert, experts.counts, experts.number, EXPERTS)
    o_row = first + nth * ROWS + tl.arange(0, ROWS)
    # The last group has fewer tiles, and so fewer programs with a block of columns.
    i_expert = tl.where((i_tile < num_tiles) & (i_block < num_blocks), i_expert, experts.number)
    return i_expert, o_row, o_row < end, i_block * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _rows_at(rows, o_row, m_row, o_column):
    """Return pointers `[rows, columns]`."""
    if rows.order is not None:
        o_row = tl.load(rows.order + o_row, mask=m_row, other=0) // rows.shared
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
    p_x, p_matrix = _rows_at(x, o_row, m_row, o_depth), _matrix_at(matrices, i_expert, o_depth, o_column)
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
def _store(out, b_values, tile, width, ADD: tl.constexpr = False):
    """Set rows of out, or add to them."""
    _, o_row, m_row, o_column = tile
    p_out, mask = _rows_at(out, o_row, m_row, o_column), m_row[:, None] & (o_column < width)[None, :]
    if ADD:
        b_values += tl.load(p_out, mask=mask, other=0.0)
    tl.store(p_out, b_values, mask=mask)


@triton.jit
def product_kernel(
    out, x, matrices, y, others, experts, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr, ADD: tl.constexpr = False,
):  # fmt: skip
    """Write x matrix, or x matrix + y other: rows `[N, width]` of x, y `[N, depth]`."""
    tile = _tile(experts, width, ROWS, COLUMNS, EXPERTS)
    if tile[0] == experts.number:
        return
    b_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_acc, _ = _multiply(b_acc, b_acc, x, matrices, None, tile, width, depth, DEPTH)
    if others is not None:
        b_acc, _ = _multiply(b_acc, b_acc, y, others, None, tile, width, depth, DEPTH)
    _store(out, b_acc, tile, width, ADD)


@triton.jit
def swiglu_kernel(
    inner, x, gate, up, experts, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write silu(x gate) * (x up): rows `[N, width]` of x `[N, depth]`."""
    tile = _tile(experts, width, ROWS, COLUMNS, EXPERTS)
    if tile[0] == experts.number:
        return
    b_zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_gate, b_up = _multiply(b_zeros, b_zeros, x, gate, up, tile, width, depth, DEPTH)
    _store(inner, b_gate * tl.sigmoid(b_gate) * b_up, tile, width)


@triton.jit
def swiglu_backward_kernel(
    inner, dgate, dup, x, dout, gate, up, down, experts, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write inner = silu(x gate) * (x up), and the gradients of x gate and of x up: rows `[N, width]`.

    dout, like x, `[N, depth]`.
    """
    tile = _tile(experts, width, ROWS, COLUMNS, EXPERTS)
    if tile[0] == experts.number:
        return
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
    dweight, dout, x, experts, longest_first, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write dout^T x over all rows of an expert: a matrix of `depth` columns for each of `width`; 0 without rows.

    longest_first: the experts, int64, so that none with many rows starts when all others are done.
    """
    num_down, num_across = tl.cdiv(width, COLUMNS), tl.cdiv(depth, DEPTH)
    i_nth, i_block = tl.program_id(0) // (num_down * num_across), tl.program_id(0) % (num_down * num_across)
    o_column = i_block // num_across * COLUMNS + tl.arange(0, COLUMNS)
    o_depth = i_block % num_across * DEPTH + tl.arange(0, DEPTH)
    i_expert = tl.load(longest_first + i_nth)
    first, end = _rows_of(i_expert, experts.counts, experts.number, EXPERTS)
    # One program sums over all rows of its expert: nothing is added by atomics, and the sum stays in registers.
    b_acc = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(first, end, ROWS):
        o_row = start + tl.arange(0, ROWS)
        m_row = o_row < end
        # [ROWS, COLUMNS], [ROWS, DEPTH]
        b_dout = tl.load(
            _rows_at(dout, o_row, m_row, o_column), mask=m_row[:, None] & (o_column < width)[None, :], other=0.0
        )
        b_x = tl.load(_rows_at(x, o_row, m_row, o_depth), mask=m_row[:, None] & (o_depth < depth)[None, :], other=0.0)
        b_acc = tl.dot(tl.trans(b_dout), b_x, b_acc, input_precision="ieee")
    # [DEPTH, COLUMNS] -> [COLUMNS, DEPTH]
    p_dweight = tl.trans(_matrix_at(dweight, i_expert, o_depth, o_column))
    tl.store(p_dweight, b_acc, mask=(o_column < width)[:, None] & (o_depth < depth)[None, :])
