"""Products of rows, sorted by expert, with matrices of their expert: one product after another, on any device.

Legend: N rows, E experts; an expert has the next counts[e] rows.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.moe.expert_threads import for_each_expert

aten = torch.ops.aten

CHUNK_ROWS = 4096
"""Rows of an expert whose inner values are held at the same time: a hot expert takes no more memory than even ones.

Gradients of weights are rounded once for each chunk.
"""


def linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Return x weight_e^T `[N, out]` of x `[N, in]`, weight `[E, out, in]`."""
    out, ends = x.new_empty(len(x), weight.shape[1]), list(accumulate(counts))

    def work(expert: int) -> None:
        rows = slice(ends[expert] - counts[expert], ends[expert])
        torch.mm(x[rows], weight[expert].t(), out=out[rows])

    for_each_expert(counts, x.device, work)
    return out


def linear_backward(x: Tensor, weight: Tensor, counts: Sequence[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx `[N, in]` and dweight, as weight is; dout `[N, out]`."""
    dx, dout, ends = x.new_empty(x.shape), dout.contiguous(), list(accumulate(counts))
    (dweight,) = _gradients(counts, weight)

    def work(expert: int) -> None:
        rows = slice(ends[expert] - counts[expert], ends[expert])
        torch.mm(dout[rows], weight[expert], out=dx[rows])
        torch.mm(dout[rows].t(), x[rows], out=dweight[expert])

    for_each_expert(counts, x.device, work)
    return dx, dweight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)), as x `[N, C]` is; gate, up `[E, F, C]`, down `[E, C, F]`."""
    out, ends = x.new_empty(x.shape), list(accumulate(counts))

    def work(expert: int) -> None:
        for part in _chunks(ends[expert] - counts[expert], ends[expert]):
            inner = F.silu(x[part] @ gate[expert].t(), inplace=True).mul_(x[part] @ up[expert].t())
            torch.mm(inner, down[expert].t(), out=out[part])

    for_each_expert(counts, x.device, work)
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dgate, dup and ddown, each as the input is; gate and up of the rows are computed again."""
    dx, dout, ends = x.new_empty(x.shape), dout.contiguous(), list(accumulate(counts))
    dgate, dup, ddown = _gradients(counts, gate, up, down)

    def work(expert: int) -> None:
        begin = ends[expert] - counts[expert]
        for part in _chunks(begin, ends[expert]):
            rows, of_rows, place, more = x[part], dout[part], dx[part], part.start > begin
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

    for_each_expert(counts, x.device, work)
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


def _chunks(start: int, end: int) -> Iterator[slice]:
    """Yield the rows from start to end, at most CHUNK_ROWS at a time."""
    for first in range(start, end, CHUNK_ROWS):
        yield slice(first, min(first + CHUNK_ROWS, end))


def _sum(to: Tensor, a: Tensor, b: Tensor, more: bool) -> None:
    """Set `to` to a b, or add that to it."""
    torch.addmm(to, a, b, beta=int(more), out=to)
