"""Products of rows, sorted by expert, with matrices of their expert: one product after another, on any device.

Legend: N rows, E experts; an expert has the next counts[e] rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x weight_e^T `[N, out]` of x `[N, in]`, weight `[E, out, in]`."""
    out = x.new_empty(len(x), weight.shape[1])
    for matrix, rows, place in zip(weight, x.split(counts), out.split(counts), strict=True):
        if len(rows):
            torch.mm(rows, matrix.t(), out=place)
    return out


def linear_backward(x: Tensor, weight: Tensor, counts: Sequence[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx `[N, in]` and dweight, as weight is; dout `[N, out]`."""
    dx, dweight = x.new_empty(x.shape), torch.empty_like(weight)
    parts = (x.split(counts), dout.contiguous().split(counts), dx.split(counts))
    for matrix, dmatrix, rows, of_rows, place in zip(weight, dweight, *parts, strict=True):
        if len(rows):
            torch.mm(of_rows, matrix, out=place)
            torch.mm(of_rows.t(), rows, out=dmatrix)
        else:
            dmatrix.zero_()
    return dx, dweight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)), as x `[N, C]` is; gate, up `[E, F, C]`, down `[E, C, F]`."""
    out = x.new_empty(x.shape)
    for expert, (rows, place) in enumerate(zip(x.split(counts), out.split(counts), strict=True)):
        if len(rows):
            inner = F.silu(rows @ gate[expert].t(), inplace=True).mul_(rows @ up[expert].t())
            torch.mm(inner, down[expert].t(), out=place)
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dgate, dup and ddown, each as the input is; gate and up of the rows are computed again."""
    dx = x.new_empty(x.shape)
    # Memory that is filled twice, with 0 and with a gradient, takes a tenth of the time of a step of small experts.
    gradients = dgate, dup, ddown = tuple(torch.empty_like(weight) for weight in (gate, up, down))
    parts = (x.split(counts), dout.contiguous().split(counts), dx.split(counts))
    for expert, (rows, of_rows, place) in enumerate(zip(*parts, strict=True)):
        if not len(rows):
            for gradient in gradients:
                gradient[expert].zero_()
            continue
        gated, raised = rows @ gate[expert].t(), rows @ up[expert].t()
        silu = F.silu(gated)
        dinner = of_rows @ down[expert]
        torch.mm(of_rows.t(), silu * raised, out=ddown[expert])
        draised = silu.mul_(dinner)
        dgated = aten.silu_backward(dinner.mul_(raised), gated)
        torch.mm(dgated.t(), rows, out=dgate[expert])
        torch.mm(draised.t(), rows, out=dup[expert])
        torch.mm(dgated, gate[expert], out=place)
        place.addmm_(draised, up[expert])
    return dx, dgate, dup, ddown
