"""A linear map by many experts: rows sorted by expert, each stretch multiplied by a matrix of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.moe.grouped_gemm import check, products_of


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x weight_e^T `[rows, out]` of x `[rows, in]`; expert e has the next counts[e] rows.

    weight `[E, out, in]`, of x's dtype and any strides, such as a view of the one matrix of a linear map; its gradient
    is a tensor of its own, laid out alike. Any count may be 0. Raises ValueError when the counts are not those of the
    rows and experts, or shapes or dtypes do not fit.
    """
    check(x, counts, {"weight": (weight, (weight.shape[-2], x.shape[-1]))})
    return _GroupedLinear.apply(x, weight, tuple(counts))  # pyright: ignore[reportReturnType]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return products_of(x).linear(x, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return *products_of(x).linear_backward(x, weight, ctx.counts, dout), None
