# pyright: reportMissingImports=false
"""Kernels for products of rows, sorted by expert, with matrices of their expert.

A tile is (expert, first row, end): no row at or after the end is used or written, whatever is there. Sums are float32;
float32 is multiplied in full.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
"""Tiles of rows whose programs run side by side for all columns, so that rows and matrices are read from L2."""


@triton.jit
def _own(tiles, num_tiles, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return (expert, rows `[ROWS]`, whether they are the tile's, columns `[COLUMNS]`) of this program."""
    blocks = tl.cdiv(width, COLUMNS)
    group = tl.program_id(0) // (GROUP * blocks)
    within = tl.program_id(0) % (GROUP * blocks)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    at = tiles + (group * GROUP + within % size) * 3
    row = tl.load(at + 1) + tl.arange(0, ROWS)
    return tl.load(at), row, row < tl.load(at + 2), within // size * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _rows_at(rows, row, column):
    return rows.pointer + row.to(tl.int64)[:, None] * rows.row + column[None, :]


@triton.jit
def _matrix_at(matrices, expert, depth, column):
    """Return pointers `[depth, columns]` to the matrix of an expert."""
    start = matrices.pointer + expert.to(tl.int64) * matrices.expert
    return start + depth.to(tl.int64)[:, None] * matrices.depth + column.to(tl.int64)[None, :] * matrices.column


@triton.jit
def _multiply(acc, x, matrices, expert, row, there, column, width, depth, DEPTH: tl.constexpr):
    """Return acc plus the product of rows of x and columns of the expert's matrix."""
    nth = tl.arange(0, DEPTH)
    x_at, at = _rows_at(x, row, nth), _matrix_at(matrices, expert, nth, column)
    for start in range(0, depth, DEPTH):
        inside = nth < depth - start
        rows = tl.load(x_at, mask=there[:, None] & inside[None, :], other=0.0)
        matrix = tl.load(at, mask=inside[:, None] & (column < width)[None, :], other=0.0)
        acc = tl.dot(rows, matrix, acc, input_precision="ieee")
        x_at += DEPTH
        at += DEPTH * matrices.depth
    return acc


@triton.jit
def _gate_and_up(
    x, gate, up, expert, row, there, column, width, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Return the products of rows of x with the expert's gate and up, float32 `[ROWS, COLUMNS]`."""
    gated = tl.zeros([ROWS, COLUMNS], tl.float32)
    raised = tl.zeros([ROWS, COLUMNS], tl.float32)
    nth = tl.arange(0, DEPTH)
    x_at = _rows_at(x, row, nth)
    gate_at, up_at = _matrix_at(gate, expert, nth, column), _matrix_at(up, expert, nth, column)
    for start in range(0, depth, DEPTH):
        inside = nth < depth - start
        rows = tl.load(x_at, mask=there[:, None] & inside[None, :], other=0.0)
        mask = inside[:, None] & (column < width)[None, :]
        gated = tl.dot(rows, tl.load(gate_at, mask=mask, other=0.0), gated, input_precision="ieee")
        raised = tl.dot(rows, tl.load(up_at, mask=mask, other=0.0), raised, input_precision="ieee")
        x_at += DEPTH
        gate_at += DEPTH * gate.depth
        up_at += DEPTH * up.depth
    return gated, raised


@triton.jit
def _store(out, values, row, there, column, width):
    tl.store(_rows_at(out, row, column), values, mask=there[:, None] & (column < width)[None, :])


@triton.jit
def product_kernel(
    out, x, matrices, y, others, tiles, num_tiles, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write x matrix, or x matrix + y other: rows `[N, width]` of x, y `[N, depth]`."""
    expert, row, there, column = _own(tiles, num_tiles, width, ROWS, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc = _multiply(acc, x, matrices, expert, row, there, column, width, depth, DEPTH)
    if y is not None:
        acc = _multiply(acc, y, others, expert, row, there, column, width, depth, DEPTH)
    _store(out, acc, row, there, column, width)


@triton.jit
def swiglu_kernel(
    inner, x, gate, up, tiles, num_tiles, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write silu(x gate) * (x up): rows `[N, width]` of x `[N, depth]`."""
    expert, row, there, column = _own(tiles, num_tiles, width, ROWS, COLUMNS)
    gated, raised = _gate_and_up(x, gate, up, expert, row, there, column, width, depth, ROWS, COLUMNS, DEPTH)
    _store(inner, gated * tl.sigmoid(gated) * raised, row, there, column, width)


@triton.jit
def swiglu_backward_kernel(
    inner, dgated, draised, x, dout, gate, up, down, tiles, num_tiles, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write silu(gated) * raised and the gradients of gated = x gate and raised = x up: rows `[N, width]`.

    dout, as x, `[N, depth]`.
    """
    expert, row, there, column = _own(tiles, num_tiles, width, ROWS, COLUMNS)
    gated, raised = _gate_and_up(x, gate, up, expert, row, there, column, width, depth, ROWS, COLUMNS, DEPTH)
    dinner = tl.zeros([ROWS, COLUMNS], tl.float32)
    dinner = _multiply(dinner, dout, down, expert, row, there, column, width, depth, DEPTH)
    sigmoid = tl.sigmoid(gated)
    silu = gated * sigmoid
    _store(inner, silu * raised, row, there, column, width)
    _store(draised, dinner * silu, row, there, column, width)
    # The derivative of silu is sigmoid (1 + gated (1 - sigmoid)).
    _store(dgated, dinner * raised * sigmoid * (1 + gated * (1 - sigmoid)), row, there, column, width)


@triton.jit
def weight_kernel(
    dweight, dout, x, stretches, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write dout^T x over all rows of an expert: a matrix of `depth` columns for each of `width`; 0 without rows."""
    down, across = tl.cdiv(width, COLUMNS), tl.cdiv(depth, DEPTH)
    segment, block = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    column = block // across * COLUMNS + tl.arange(0, COLUMNS)
    nth = block % across * DEPTH + tl.arange(0, DEPTH)
    expert, first, end = (tl.load(stretches + segment * 3), tl.load(stretches + segment * 3 + 1),
                          tl.load(stretches + segment * 3 + 2))  # fmt: skip
    acc = tl.zeros([COLUMNS, DEPTH], tl.float32)
    row = first + tl.arange(0, ROWS)
    out_at, x_at = _rows_at(dout, row, column), _rows_at(x, row, nth)
    for start in range(first, end, ROWS):
        there = start - first + row < end
        of_rows = tl.load(out_at, mask=there[:, None] & (column < width)[None, :], other=0.0)
        rows = tl.load(x_at, mask=there[:, None] & (nth < depth)[None, :], other=0.0)
        acc = tl.dot(tl.trans(of_rows), rows, acc, input_precision="ieee")
        out_at += ROWS * tl.cast(dout.row, tl.int64)
        x_at += ROWS * tl.cast(x.row, tl.int64)
    to = tl.trans(_matrix_at(dweight, expert, nth, column))
    tl.store(to, acc, mask=(column < width)[:, None] & (nth < depth)[None, :])
