# pyright: reportMissingImports=false
"""Products with matrices that each token chooses, by the kernels of grouped.py, which gather and scatter rows.

Legend: T tokens, K choices of each, `per_token`, E matrices; choice t * K + k is the k-th of token t. order: the
choices by matrix, int64 `[T * K]`; counts: of each matrix, int64 `[E]`.
"""

from torch import Tensor

from farspan.kernels.triton_kernels import grouped_launch
from farspan.kernels.triton_kernels.grouped_launch import ExpertRows, Rows


def each(out: Tensor, x: Tensor, weight: Tensor, order: Tensor, counts: Tensor, per_token: int) -> None:
    """Set out `[T * K, out]` to x_t W_e for each choice; x `[T, in]`, weight `[E, in, out]`."""
    experts = ExpertRows.of(counts)
    x_rows = Rows.of(x, order, per_token)
    grouped_launch.product(Rows.of(out, order), experts, len(out), (x_rows, weight))


def add_each(total: Tensor, y: Tensor, weight: Tensor, order: Tensor, counts: Tensor, per_token: int) -> None:
    """Add the sum of y_tk W_e over the choices of each token to total `[T, out]`; y `[T * K, in]`."""
    out, rows = Rows.of(total, order, per_token), Rows.of(y, order)
    # No token is twice among the choices of a matrix, so that one matrix after another adds in a fixed order.
    for matrix in range(len(weight)):
        experts = ExpertRows.of(counts, only=matrix)
        grouped_launch.product(out, experts, len(total), (rows, weight), add=True)


def weight_gradient(gradient: Tensor, y: Tensor, x: Tensor, order: Tensor, counts: Tensor, per_token: int) -> None:
    """Set gradient `[E, width of y, width of x]` to the sums of y_tk x_t^T; y `[T * K, width]`, x `[T, width]`."""
    longest_first = counts.argsort(descending=True, stable=True)
    rows = Rows.of(y, order), Rows.of(x, order, per_token)
    grouped_launch.weight_gradient(gradient, ExpertRows.of(counts), longest_first, *rows)
