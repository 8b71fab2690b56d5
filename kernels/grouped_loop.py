"""Products of rows, sorted by expert, with matrices of their expert: one product after another, on any device.

Legend: N rows, E experts; an expert has the next counts[e] rows.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

CHUNK_ROWS = 4096
"""Rows of an expert whose inner values are held at the same time: a hot expert takes no more memory than even ones.

Gradients of weights are rounded once for each chunk.
"""


def linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x weight_e^T `[N, out]` of x `[N, in]`, weight `[E, out, in]`."""
    out = x.new_empty(len(x), weight.shape[1])
    for matrix, rows, place in zip(weight, x.split(counts), out.split(counts), strict=True):
        if len(rows):
            torch.mm(rows, matrix.t(), out=place)
    return out


def linear_backward(x: Tensor, weight: Tensor, counts: Sequence[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx `[N, in]` and dweight, as weight is; dout `[N, out]`."""
    dx, dout = x.new_empty(x.shape), dout.contiguous()
    (dweight,) = _gradients(counts, weight)
    parts = (x.split(counts), dout.split(counts), dx.split(counts))
    for matrix, dmatrix, rows, of_rows, place in zip(weight, dweight, *parts, strict=True):
        if len(rows):
            torch.mm(of_rows, matrix, out=place)
            torch.mm(of_rows.t(), rows, out=dmatrix)
    return dx, dweight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)), as x `[N, C]` is; gate, up `[E, F, C]`, down `[E, C, F]`."""
    out = x.new_empty(x.shape)
    for expert, part, _ in _stretches(counts):
        inner = F.silu(x[part] @ gate[expert].t(), inplace=True).mul_(x[part] @ up[expert].t())
        torch.mm(inner, down[expert].t(), out=out[part])
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dgate, dup and ddown, each as the input is; gate and up of the rows are computed again."""
    dx, dout = x.new_empty(x.shape), dout.contiguous()
    dgate, dup, ddown = _gradients(counts, gate, up, down)
    for expert, part, more in _stretches(counts):
        rows, of_rows, place = x[part], dout[part], dx[part]
        gated, raised = rows @ gate[expert].t(), rows @ up[expert].t()
        silu = F.silu(gated)
        dinner = of_rows @ down[expert]
        _sum(ddown[expert], of_rows.t(), silu * raised, more)
        draised = silu.mul_(dinner)
        dgated = aten.silu_backward(dinner.mul_(raised), gated)
        _sum(dgate[expert], dgated.t(), rows, more)
        _sum(dup[expert], draised.t(), rows, more)
        torch.mm(dgated, gate[expert], out=place)
        place.addmm_(draised, up[expert])
    return dx, dgate, dup, ddown


def _gradients(counts: Sequence[int], *weights: Tensor) -> list[Tensor]:
    """Return room for the gradients of weights, 0 for experts without rows."""
    # Memory that is filled twice, with 0 and with a gradient, takes a tenth of the time of a step of small experts.
    gradients = [torch.empty_like(weight) for weight in weights]
    for expert, count in enumerate(counts):
        if not count:
            for gradient in gradients:
                gradient[expert].zero_()
    return gradients


def _stretches(counts: Sequence[int]) -> Iterator[tuple[int, slice, bool]]:
    """Yield (expert, rows, whether it had some before) of at most CHUNK_ROWS rows, in order."""
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        for start in range(end - count, end, CHUNK_ROWS):
            yield expert, slice(start, min(start + CHUNK_ROWS, end)), start > end - count


def _sum(to: Tensor, a: Tensor, b: Tensor, more: bool) -> None:
    """Set `to` to a b, or add that to it."""
    torch.addmm(to, a, b, beta=int(more), out=to)
