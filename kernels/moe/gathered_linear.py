"""Projections by matrices that tokens choose, several each: the work of the others is not done.

The matrices are many and the tokens of each are gathered one matrix at a time: a row of a token is never held more than
once, which for heads, far narrower than what they read, would be most of a layer's memory.

Legend: T tokens, K choices of each, E matrices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.merge import accumulation_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """by_matrix: of each matrix the choices t * K + k of tokens t that took it, ascending, int64."""

    by_matrix: tuple[Tensor, ...]
    per_token: int

    @staticmethod
    @torch.no_grad()
    def of(chosen: Tensor, matrices: int) -> "Choices":
        """Sort chosen, int64 `[T, K]`, no matrix twice for a token; the host waits for the device once."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=matrices).tolist()
        return Choices(order.split(counts), chosen.shape[1])

    def token(self, choice: Tensor) -> Tensor:
        """Return the tokens of choices."""
        return choice // self.per_token


def project_chosen(x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return W_e x_t for each choice e of each token, `[T, K, out]`; x `[T, in]`, weight `[E, out, in]`."""
    return _Project.apply(x, weight, choices)  # pyright: ignore[reportReturnType]


def combine_chosen(y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum of W_e y_tk over the choices e of each token, `[T, out]`; y `[T, K, in]`, weight `[E, out, in]`.

    Summed in the accumulation dtype, matrix by matrix, whatever the tokens beside.
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
        return _summed(dout, weight, ctx.choices), _of_weights(dout, x, weight, ctx.choices), None


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
        dweight = _of_weights(y, dout, weight.transpose(1, 2), ctx.choices).transpose(1, 2)
        return _each(dout, weight, ctx.choices), dweight, None


def _each(x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return x_t W_e for each choice, `[T, K, out]`; weight `[E, in, out]`."""
    out = x.new_empty(len(x) * choices.per_token, weight.shape[2])
    for matrix, choice in zip(weight, choices.by_matrix, strict=True):
        if len(choice):
            out.index_copy_(0, choice, x.index_select(0, choices.token(choice)) @ matrix)
    return out.unflatten(0, (len(x), choices.per_token))


def _summed(y: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum over choices of y_tk W_e, `[T, out]`; weight `[E, in, out]`."""
    total = torch.zeros(len(y), weight.shape[2], dtype=accumulation_dtype(y.dtype), device=y.device)
    rows = y.flatten(0, 1)
    for matrix, choice in zip(weight, choices.by_matrix, strict=True):
        if len(choice):
            made = rows.index_select(0, choice) @ matrix
            total.index_add_(0, choices.token(choice), made.to(total.dtype))
    return total.to(y.dtype)


def _of_weights(y: Tensor, x: Tensor, weight: Tensor, choices: Choices) -> Tensor:
    """Return the sum of y_tk x_t^T over the choices of each matrix, `[E, width of y, width of x]`, as `weight` is."""
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    rows = y.flatten(0, 1)
    for place, choice in zip(gradient, choices.by_matrix, strict=True):
        if len(choice):
            torch.mm(rows.index_select(0, choice).t(), x.index_select(0, choices.token(choice)), out=place)
    return gradient
