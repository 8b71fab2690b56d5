"""The elementwise part of SwiGLU: Shazeer, arXiv:2002.05202, equation 6."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from farspan.kernels.layers import fused


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of one shape and dtype, as is the result.

    On a GPU one kernel computes it in float32 and rounds once, and the backward pass keeps gate and up only.
    """
    if fused.serves(gate, up):
        return _SiluProduct.apply(gate, up)  # pyright: ignore[reportReturnType]
    return functional.silu(gate) * up


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from farspan.kernels.triton_kernels import layers_launch

        ctx.save_for_backward(gate, up)
        return layers_launch.silu_product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from farspan.kernels.triton_kernels import layers_launch

        return layers_launch.silu_product_backward(dout, *ctx.saved_tensors)
