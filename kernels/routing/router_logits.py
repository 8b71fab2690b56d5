"""Router logits: the numbers per token by which a mechanism chooses."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.merge import accumulation_dtype

CHUNK_TOKENS = 4096
"""Tokens whose float64 copies exist at the same time."""


def routing_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T `[tokens, out]` in the accumulation dtype, of x `[tokens, width]` and weight `[out, width]`.

    Products and sums are float64 and rounded once: equal tokens have equal logits wherever they are computed, so ties
    are real, and broken by position. The backward pass saves x and weight as given and sums in the accumulation dtype.
    """
    return _RoutingFunction.apply(x, weight)  # pyright: ignore[reportReturnType]


class _RoutingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        logits = torch.empty(len(x), len(weight), dtype=accumulation_dtype(x.dtype), device=x.device)
        across = weight.double().t()  # [width, out]
        for part, rows in zip(logits.split(CHUNK_TOKENS), x.split(CHUNK_TOKENS), strict=True):
            part.copy_(rows.double() @ across)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wants_dx, wants_dweight = ctx.needs_input_grad
        # [tokens, out] x [out, width], and [out, tokens] x [tokens, width]
        dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype) if wants_dx else None
        dweight = (dlogits.t() @ x.to(dlogits.dtype)).to(weight.dtype) if wants_dweight else None
        return dx, dweight
