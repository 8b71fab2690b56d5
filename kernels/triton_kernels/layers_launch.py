# pyright: reportMissingImports=false
"""RMS norm, rotary embedding and SwiGLU: launches of the kernels. One launch each way, one more sum for a weight.

Legend: T tokens, C width of a norm, F inner size, D head dim, R features that rotate.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from farspan.kernels.triton_kernels import layers as kernels

TILE_ELEMENTS = 2048
"""Elements of a norm that a program has at a time, but at least a row: 16 for each thread of 4 warps, 8 of float32."""
WEIGHT_PARTS = 512
"""Programs that sum the gradient of a norm's weight; a constant, so that its bits are the same on every device."""
ROPE_TILE_BYTES = 2048
"""Those of a head that a program has at a time: 8 tokens of 128 features in 16 bits."""
SWIGLU_ELEMENTS = 2048  # 16 for each thread


def rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (norm, x or x + delta, 1 / root mean square); x, delta `[..., C]`, the last float32 `[rows]`."""
    given, delta, width = x, None if delta is None else delta.contiguous(), x.shape[-1]
    x, rows = x.contiguous(), x.numel() // width
    out, total = torch.empty_like(x), given if delta is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    tile_rows, columns, warps = _norm_tile(width, x.dtype)
    _launch(
        kernels.rms_norm_kernel, triton.cdiv(rows, tile_rows),
        out, total, rstd, x, delta, weight.contiguous(), rows, width, epsilon,
        ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return out, total, rstd


def rms_norm_backward(
    dout: Tensor, dtotal: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (dx, dweight) of the norm of x `[..., C]`; dtotal: the gradient of x from elsewhere, which dx includes."""
    x, dtotal, width = x.contiguous(), None if dtotal is None else dtotal.contiguous(), x.shape[-1]
    rows, dx = len(rstd), torch.empty_like(x)
    tile_rows, columns, warps = _norm_tile(width, x.dtype)
    rows_per_program = tile_rows * triton.cdiv(rows, tile_rows * WEIGHT_PARTS)
    programs = triton.cdiv(rows, max(rows_per_program, 1))
    parts = x.new_empty(programs, width, dtype=torch.float32)
    _launch(
        kernels.rms_norm_backward_kernel, programs,
        dx, parts, dout.contiguous(), dtotal, x, rstd, weight.contiguous(), rows, width, rows_per_program,
        ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return dx, parts.sum(dim=0).to(weight.dtype)


def _norm_tile(width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and its warps."""
    columns = triton.next_power_of_2(width)
    rows = max(TILE_ELEMENTS // columns, 1)
    return rows, columns, min(max(rows * columns * dtype.itemsize // 1024, 4), 16)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """Return q `[T, Hq, D]` and k `[T, Hk, D]` rotated by the tables, float32 `[T, R/2]`; back: the other way round."""
    # Gradients of attention may come as [heads, tokens, width]: strides save a copy.
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    half, width = cos.shape[1], q.shape[2]
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    tokens = max(ROPE_TILE_BYTES // (q.element_size() * triton.next_power_of_2(width)), 1)
    _launch(
        kernels.rope_kernel, triton.cdiv(len(q), tokens),
        out_q, out_k, q, k, cos.contiguous(), sin.contiguous(), len(q), q.shape[1], k.shape[1], *q.stride()[:2],
        *k.stride()[:2], width, half,
        BACK=back, ROWS=tokens, COLUMNS=triton.next_power_of_2(half),
        STILL=triton.next_power_of_2(max(width - 2 * half, 1)), num_warps=4,
    )  # fmt: skip
    return out_q, out_k


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of any shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _elementwise(kernels.silu_product_kernel, out, gate, up)
    return out


def silu_product_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _elementwise(kernels.silu_product_backward_kernel, dgate, dup, dout, gate, up)
    return dgate, dup


def _elementwise(kernel: Any, *tensors: Tensor) -> None:
    elements = tensors[0].numel()
    programs = triton.cdiv(elements, SWIGLU_ELEMENTS)
    _launch(kernel, programs, *tensors, elements, COLUMNS=SWIGLU_ELEMENTS, num_warps=4)


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    if programs:
        # Nothing to prefetch: a loop, where there is one, has no product to wait for.
        kernel[(programs,)](*arguments, num_stages=1, **options)
