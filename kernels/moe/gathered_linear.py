"""Projections by matrices that each token chooses: matrices that a token does not choose are skipped.

The tokens of one matrix are gathered at a time. Gathering for all of them at once would copy each row K times, which
for heads, far narrower than their input, would be most of a layer's memory.

Legend: T tokens, K choices of each, E matrices; choice t * K + k is the k-th of token t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.merge import accumulation_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """by_matrix: the choices of each matrix, ascending, int64."""

    by_matrix: tuple[Tensor, ...]
    per_token: int

    @staticmethod
    @torch.no_grad()
    def of(chosen: Tensor, matrices: int) -> "Choices":
        """Sort chosen, int64 `[T, K]`, no matrix twice for a token."""
        # The host waits for the device once, for the counts.
        # [T, K] -> [T * K] -> E lists
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=matrices).tolist()
        return Choices(order.split(counts), chosen.shape[1])

    def token(self, choice: Tensor) -> Tensor:
        return choice // self.per_token


def project_chosen(x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return W_e x_t for each choice e of each token, `[T, K, out]`; x `[T, in]`, weight `[E, out, in]`."""
    return _Project.apply(x, weight, choices)  # pyright: ignore[reportReturnType]


def combine_chosen(y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum of W_e y_tk over the choices e of each token, `[T, out]`; y `[T, K, in]`, weight `[E, out, in]`.

    Summed in the accumulation dtype, matrix by matrix, so that a token's sum does not depend on other tokens.
    """
    return _Combine.apply(y, weight, choices)  # pyright: ignore[reportReturnType]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.choices = choices
        return _each(x, weight.transpose(1, 2), choices)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return _summed(dout, weight, ctx.choices), _weight_gradient(dout, x, weight, ctx.choices), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.choices = choices
        return _summed(y, weight.transpose(1, 2), choices)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weight = ctx.saved_tensors
        dweight = _weight_gradient(y, dout, weight.transpose(1, 2), ctx.choices).transpose(1, 2)
        return _each(dout, weight, ctx.choices), dweight, None


def _each(x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return x_t W_e for each choice, `[T, K, out]`; weight `[E, in, out]`."""
    # [T * K, out] -> [T, K, out]
    out = x.new_empty(len(x) * choices.per_token, weight.shape[2])
    for matrix, choice in zip(weight, choices.by_matrix, strict=True):
        if len(choice):
            out.index_copy_(0, choice, x.index_select(0, choices.token(choice)) @ matrix)
    return out.unflatten(0, (len(x), choices.per_token))


def _summed(y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum over choices of y_tk W_e, `[T, out]`; weight `[E, in, out]`."""
    total = torch.zeros(len(y), weight.shape[2], dtype=accumulation_dtype(y.dtype), device=y.device)
    # [T, K, in] -> [T * K, in]
    rows = y.flatten(0, 1)
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
    for of_matrix, choice in zip(gradient, choices.by_matrix, strict=True):
        if len(choice):
            torch.mm(rows.index_select(0, choice).t(), x.index_select(0, choices.token(choice)), out=of_matrix)
    return gradient
