# pyright: reportMissingImports=false
"""Kernels for what stands between a block's matrix products: RMS norm, rotary embedding, SwiGLU.

Each reads its operands once and writes its results once; sums and products are float32, and results are rounded once.
Tensors are contiguous, and no gradient is added by atomics: a result has the same bits each time.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    out, total, rstd, x, delta, weight, rows, width, epsilon,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the norm of rows `[rows, width]` of x, and 1 / their root mean square `[rows]`.

    With delta: the norm of x + delta, and this sum into `total`.
    """
    # int64: rows x width exceeds 2^31 at half a million tokens of width 4,096. Within a tile 32 bits are enough.
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_row, m_column = i_row + o_row < rows, o_column < width
    mask = m_row[:, None] & m_column[None, :]
    first, o_tile = i_row * width, o_row[:, None] * width + o_column[None, :]
    b_x = tl.load(x + first + o_tile, mask=mask, other=0.0).to(tl.float32)
    if delta is not None:
        b_x += tl.load(delta + first + o_tile, mask=mask, other=0.0).to(tl.float32)
        # The backward pass reads the sum as it is stored: the norm is of that, not of the unrounded one.
        b_total = b_x.to(total.dtype.element_ty)
        tl.store(total + first + o_tile, b_total, mask=mask)
        b_x = b_total.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / width + epsilon)
    tl.store(rstd + i_row + o_row, b_rstd, mask=m_row)
    b_weight = tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)
    tl.store(out + first + o_tile, (b_x * b_rstd[:, None] * b_weight[None, :]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    dx, dweight, dout, dtotal, x, rstd, weight, rows, width, rows_per_program,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of rows `[rows, width]` of x and, float32, this program's part of that of the weight.

    With n = x rstd: dx = rstd (w dout - n mean(w dout n)), dweight = sum of dout n. dtotal, if given, is added to dx:
    the gradient of x as the residual stream.
    """
    i_program = tl.program_id(0).to(tl.int64)
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_column, o_tile = o_column < width, o_row[:, None] * width + o_column[None, :]
    # All rows of a program add up in registers, the programs' parts are summed in a fixed order afterwards.
    b_dweight = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, rows_per_program, ROWS):
        # A multiple of ROWS: no tile reaches into the next program's rows.
        i_row = i_program * rows_per_program + start
        m_row = i_row + o_row < rows
        mask = m_row[:, None] & m_column[None, :]
        first = i_row * width
        b_dout = tl.load(dout + first + o_tile, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + i_row + o_row, mask=m_row, other=0.0)
        b_norm = tl.load(x + first + o_tile, mask=mask, other=0.0).to(tl.float32) * b_rstd[:, None]
        b_dweight += tl.sum(b_dout * b_norm, axis=0)
        # Loaded again for each tile: it is near, and registers are few.
        b_dnorm = b_dout * tl.load(weight + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        b_mean = tl.sum(b_dnorm * b_norm, axis=1) / width
        b_dx = (b_dnorm - b_norm * b_mean[:, None]) * b_rstd[:, None]
        if dtotal is not None:
            b_dx += tl.load(dtotal + first + o_tile, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + first + o_tile, b_dx.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + i_program * width + o_column, b_dweight, mask=m_column)


@triton.jit
def _rotate(
    out, x, token_stride, head_stride, b_cos, b_sin, i_token, m_token, heads, width, half,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STILL: tl.constexpr,
):  # fmt: skip
    """Rotate tokens from i_token on of x `[tokens, heads, width]`: features i and i + half by tables `[ROWS, COLUMNS]`.

    out is contiguous; x has any strides of tokens and heads.
    """
    o_row, o_pair, o_still = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, STILL)[None, :]
    mask = m_token[:, None] & (o_pair < half)
    # int64, as i_token is: tokens x heads x width exceeds 2^31 at half a million tokens of 32 heads of 128. Within the
    # tokens of a program 32 bits are enough.
    p_out, p_x = out + i_token * heads * width, x + i_token * token_stride
    o_out, o_x = o_row * heads * width, o_row * token_stride
    for _ in range(heads):
        b_first = tl.load(p_x + o_x + o_pair, mask=mask, other=0.0).to(tl.float32)
        b_second = tl.load(p_x + half + o_x + o_pair, mask=mask, other=0.0).to(tl.float32)
        b_turned = b_first * b_cos - b_second * b_sin
        tl.store(p_out + o_out + o_pair, b_turned.to(out.dtype.element_ty), mask=mask)
        b_turned = b_second * b_cos + b_first * b_sin
        tl.store(p_out + half + o_out + o_pair, b_turned.to(out.dtype.element_ty), mask=mask)
        if 2 * half < width:
            m_rest = m_token[:, None] & (2 * half + o_still < width)
            b_rest = tl.load(p_x + 2 * half + o_x + o_still, mask=m_rest, other=0.0)
            tl.store(p_out + 2 * half + o_out + o_still, b_rest, mask=m_rest)
        p_out += width
        p_x += tl.cast(head_stride, tl.int64)


@triton.jit
def rope_kernel(
    out_q, out_k, q, k, cos, sin, tokens, q_heads, k_heads,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, width, half,
    BACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STILL: tl.constexpr,
):  # fmt: skip
    """Rotate q `[tokens, q_heads, width]` and k by the tables `[tokens, half]`; with BACK, by the opposite angles.

    A program takes all heads of its tokens, so that the tables are read once.
    """
    i_token = tl.program_id(0).to(tl.int64) * ROWS
    o_row, o_pair = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m_token = i_token + o_row < tokens
    first, o_table = i_token * half, o_row[:, None] * half + o_pair[None, :]
    mask = m_token[:, None] & (o_pair < half)[None, :]
    b_cos = tl.load(cos + first + o_table, mask=mask, other=0.0)
    b_sin = tl.load(sin + first + o_table, mask=mask, other=0.0)
    if BACK:
        b_sin = -b_sin
    _rotate(
        out_q, q, q_token_stride, q_head_stride, b_cos, b_sin, i_token, m_token, q_heads, width, half,
        ROWS, COLUMNS, STILL,
    )  # fmt: skip
    _rotate(
        out_k, k, k_token_stride, k_head_stride, b_cos, b_sin, i_token, m_token, k_heads, width, half,
        ROWS, COLUMNS, STILL,
    )  # fmt: skip


@triton.jit
def silu_product_kernel(out, gate, up, elements, COLUMNS: tl.constexpr):
    """Write silu(gate) * up, element by element."""
    o_element = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = o_element < elements
    b_gate = tl.load(gate + o_element, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_element, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + o_element, (b_gate * tl.sigmoid(b_gate) * b_up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def silu_product_backward_kernel(dgate, dup, dout, gate, up, elements, COLUMNS: tl.constexpr):
    """Write the gradients of gate and up."""
    o_element = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = o_element < elements
    b_dout = tl.load(dout + o_element, mask=mask, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + o_element, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up + o_element, mask=mask, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    tl.store(dup + o_element, (b_dout * b_gate * b_sigmoid).to(dup.dtype.element_ty), mask=mask)
    # The derivative of silu is sigmoid (1 + gate (1 - sigmoid)).
    b_dgate = b_dout * b_up * b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
    tl.store(dgate + o_element, b_dgate.to(dgate.dtype.element_ty), mask=mask)
