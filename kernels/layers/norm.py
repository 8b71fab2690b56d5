"""Root-mean-square normalization: Zhang and Sennrich, arXiv:1910.07467, equation 4."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.kernels.layers import fused

WIDEST_FUSED = 8192
"""A row is held in registers, which wider ones exceed: torch normalizes these."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's dtype and shape; weight `[width]`.

    Computed in float32 (float64 for float64) and rounded once, after the weight. Llama's own code rounds twice in
    bfloat16, before and after the weight: results differ by that rounding, and these have 1.4 to 1.7 times smaller
    errors (measured: values and both gradients).
    """
    if _is_fused(x, weight):
        out, _ = _RmsNorm.apply(x, None, weight, eps)  # pyright: ignore[reportGeneralTypeIssues]
        return out
    # The wider of the two dtypes: a float32 weight is not rounded to bfloat16.
    compute = torch.promote_types(x.dtype, weight.dtype)
    return functional.rms_norm(x.to(compute), weight.shape, weight.to(compute), eps).to(x.dtype)


def residual_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its `rms_norm`), or (x, its `rms_norm`) without delta; x and delta have one shape and dtype.

    On a GPU it is one kernel each way, which also adds up the gradients that arrive at the sum and at the norm.
    """
    if _is_fused(x, weight):
        out, total = _RmsNorm.apply(x, delta, weight, eps)  # pyright: ignore[reportGeneralTypeIssues]
        return total, out
    total = x if delta is None else x + delta
    return total, rms_norm(total, weight, eps)


def _is_fused(x: Tensor, weight: Tensor) -> bool:
    return x.shape[-1] <= WIDEST_FUSED and fused.serves(x, weight)


class _RmsNorm(torch.autograd.Function):
    """The norm of x, or of x + delta, and that sum, or x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # Triton is installed wherever torch has CUDA, and need not be elsewhere.
        from farspan.kernels.triton_kernels import layers_launch

        out, total, rstd = layers_launch.rms_norm(x, delta, weight, eps)
        ctx.save_for_backward(total, rstd, weight)
        # Where the norm or the sum has no gradient, no zeros are made for it.
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from farspan.kernels.triton_kernels import layers_launch

        if dout is None:
            return dtotal, dtotal, None, None
        x, rstd, weight = ctx.saved_tensors
        dx, dweight = layers_launch.rms_norm_backward(dout, dtotal, x, rstd, weight)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None
