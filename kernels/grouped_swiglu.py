"""SwiGLU by many experts: rows sorted by expert, each stretch multiplied by matrices of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)) `[rows, C]` of x `[rows, C]`; expert e has the next counts[e] rows.

    gate, up `[E, F, C]`, down `[E, C, F]`. Any count may be 0. Only x is kept of the rows: gate and up are computed
    again in the backward pass. Raises ValueError when the counts are not those of the rows and experts.
    """
    if len(counts) != len(gate) or sum(counts) != len(x):
        raise ValueError(f"{len(counts)} experts with {sum(counts)} rows in all, but {len(gate)} and {len(x)} are here")
    return _GroupedSwiglu.apply(x, gate, up, down, tuple(counts))  # pyright: ignore[reportReturnType]


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        ctx.counts = counts
        out = torch.empty_like(x)
        for expert, (rows, place) in enumerate(zip(x.split(counts), out.split(counts), strict=True)):
            if len(rows):
                inner = F.silu(rows @ gate[expert].t()).mul_(rows @ up[expert].t())
                torch.mm(inner, down[expert].t(), out=place)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, up, down = ctx.saved_tensors
        dx = torch.empty_like(x)
        dgate, dup, ddown = (torch.zeros_like(weight) for weight in (gate, up, down))
        stretches = zip(x.split(ctx.counts), dout.contiguous().split(ctx.counts), dx.split(ctx.counts), strict=True)
        for expert, (rows, of_rows, place) in enumerate(stretches):
            if not len(rows):
                continue
            gated, raised = rows @ gate[expert].t(), rows @ up[expert].t()
            sigmoid = gated.sigmoid()
            silu = gated * sigmoid
            torch.mm(of_rows.t(), silu * raised, out=ddown[expert])
            dinner = of_rows @ down[expert]
            # The derivative of silu is sigmoid (1 + gated (1 - sigmoid)).
            dgated = dinner * raised * sigmoid * (1 + gated * (1 - sigmoid))
            draised = dinner * silu
            torch.mm(dgated.t(), rows, out=dgate[expert])
            torch.mm(draised.t(), rows, out=dup[expert])
            torch.mm(dgated, gate[expert], out=place)
            place.addmm_(draised, up[expert])
        return dx, dgate, dup, ddown, None
