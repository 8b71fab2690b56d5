"""SwiGLU by many experts: rows sorted by expert, each stretch multiplied by matrices of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.moe.grouped_gemm import check, products_of


def grouped_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)) `[rows, C]` of x `[rows, C]`; expert e has the next counts[e] rows.

    gate, up `[E, F, C]`, down `[E, C, F]`, of x's dtype. Any count may be 0. Only x is kept of the rows: gate and up
    are computed again in the backward pass. Raises ValueError when the counts are not those of the rows and experts, or
    shapes or dtypes do not fit.
    """
    width, inner = x.shape[-1], gate.shape[-2]
    shapes = {"gate": (gate, (inner, width)), "up": (up, (inner, width)), "down": (down, (width, inner))}
    check(x, counts, shapes)
    return _GroupedSwiglu.apply(x, gate, up, down, tuple(counts))  # pyright: ignore[reportReturnType]


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.counts = counts
        return products_of(x).swiglu(x, gate, up, down, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        return *products_of(x).swiglu_backward(x, *weights, ctx.counts, dout), None
