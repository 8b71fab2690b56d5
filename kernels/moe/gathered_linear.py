"""Projections by matrices that each token chooses: matrices that a token does not choose are skipped.

The tokens of one matrix are gathered at a time: on a GPU by kernels, a tile of them at a time. Gathering for all of
them at once would copy each row K times, which for heads, far narrower than their input, would be most of a layer's
memory.

Legend: T tokens, K choices of each, E matrices; choice t * K + k is the k-th of token t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.moe.grouped_gemm import on_gpu


@dataclass(frozen=True, eq=False)
class Choices:
    """order: the choices by matrix, those of each ascending, int64 `[T * K]`. counts: of each matrix, int64 `[E]`."""

    order: Tensor
    counts: Tensor
    per_token: int

    @staticmethod
    @torch.no_grad()
    def of(chosen: Tensor, matrices: int) -> "Choices":
        """Sort chosen, int64 `[T, K]`, no matrix twice for a token."""
        matrix, order = chosen.flatten().sort(stable=True)  # [T, K] -> [T * K]
        counts = chosen.new_zeros(matrices).scatter_add_(0, matrix, torch.ones_like(matrix))
        return Choices(order, counts, chosen.shape[1])

    @cached_property
    def by_matrix(self) -> tuple[Tensor, ...]:
        """The choices of each matrix; the host waits for the device."""
        return self.order.split(self.counts.tolist())

    def token(self, choice: Tensor) -> Tensor:
        return choice // self.per_token


_Of = Callable[[Tensor, Tensor, Choices], Tensor]


def project_chosen(x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return W_e x_t for each choice e of each token, `[T, K, out]`; x `[T, in]`, weight `[E, out, in]`."""
    return _Product.apply(x, weight, choices, _each, _summed)  # pyright: ignore[reportReturnType]


def combine_chosen(y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum of W_e y_tk over the choices e of each token, `[T, out]`; y `[T, K, in]`, weight `[E, out, in]`.

    Summed in the accumulation dtype, matrix by matrix, so that a token's sum does not depend on other tokens.
    """
    return _Product.apply(y, weight, choices, _summed, _each)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    """`_each` or `_summed`; the gradient of one is the other, by the transposed matrices."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, choices: Choices, product: _Of, adjoint: _Of) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.choices, ctx.adjoint = choices, adjoint
        return product(x, weight.mT, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        if ctx.adjoint is _summed:
            dweight = _weight_gradient(dout, x, weight, ctx.choices)
        else:
            dweight = _weight_gradient(x, dout, weight.mT, ctx.choices).mT
        return ctx.adjoint(dout, weight, ctx.choices), dweight, None, None, None


def _each(x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return x_t W_e for each choice, `[T, K, out]`; weight `[E, in, out]`."""
    # [T * K, out] -> [T, K, out]
    out = x.new_empty(len(x) * choices.per_token, weight.shape[2])
    if on_gpu(x):
        from farspan.kernels.triton_kernels import gathered_linear_launch

        gathered_linear_launch.each(out, x, weight, choices.order, choices.counts, choices.per_token)
        return out.unflatten(0, (len(x), choices.per_token))
    for matrix, choice in zip(weight, choices.by_matrix, strict=True):
        if len(choice):
            out.index_copy_(0, choice, x.index_select(0, choices.token(choice)) @ matrix)
    return out.unflatten(0, (len(x), choices.per_token))


def _summed(y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum over choices of y_tk W_e, `[T, out]`; weight `[E, in, out]`."""
    total = torch.zeros(len(y), weight.shape[2], dtype=accumulation_dtype(y.dtype), device=y.device)
    # [T, K, in] -> [T * K, in]
    rows = y.flatten(0, 1)
    if on_gpu(y):
        from farspan.kernels.triton_kernels import gathered_linear_launch

        gathered_linear_launch.add_each(total, rows, weight, choices.order, choices.counts, choices.per_token)
        return total.to(y.dtype)
    for matrix, choice in zip(weight, choices.by_matrix, strict=True):
        if len(choice):
            # No token is twice among the choices of a matrix, so the order of this sum is that of the matrices.
            product = rows.index_select(0, choice) @ matrix
            total.index_add_(0, choices.token(choice), product.to(total.dtype))
    return total.to(y.dtype)


def _weight_gradient(y: Tensor, x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum of y_tk x_t^T over the choices of each matrix, `[E, width of y, width of x]` like `weight`."""
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    # [T, K, width] -> [T * K, width]
    rows = y.flatten(0, 1)
    if on_gpu(x):
        from farspan.kernels.triton_kernels import gathered_linear_launch

        gathered_linear_launch.weight_gradient(gradient, rows, x, choices.order, choices.counts, choices.per_token)
        return gradient
    for of_matrix, choice in zip(gradient, choices.by_matrix, strict=True):
        if len(choice):
            torch.mm(rows.index_select(0, choice).t(), x.index_select(0, choices.token(choice)), out=of_matrix)
    return gradient
