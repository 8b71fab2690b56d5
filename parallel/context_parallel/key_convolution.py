"""The key convolution over a sharded sequence: each rank fetches the keys just before its own (see halo.py).

Keys travel in their dtype, gradients in the accumulation dtype; the sum of the gradients is rounded once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.layers.key_convolution import Taps, convolve, convolve_backward
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.halo import Halo
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeyConvolution:
    """Planned for one sharded sequence and a width; serves every layer."""

    channel: Channel
    halo: Halo
    taps: Taps

    @staticmethod
    def plan(channel: Channel, shards: Shards, width: int, device: torch.device | str = "cpu") -> "KeyConvolution":
        """Plan for `width` taps; every rank of the channel plans the same sequence. Index maps are on `device`."""
        if shards.degree != channel.size:
            raise ValueError(f"a sequence sharded over {shards.degree} ranks cannot be convolved on {channel.size}")
        halo = Halo.plan(shards, channel.rank, width - 1)
        taps = Taps.build(shards.rows_of(channel.rank), halo.rows, width)
        return KeyConvolution(channel=channel, halo=halo, taps=taps.to(device))

    def __call__(self, k: Tensor, weight: Tensor) -> Tensor:
        """Return the convolved keys of k `[tokens_local, Hk, D]`, in its dtype; weight `[width, Hk, D]`.

        Differentiable; the gradient of the weight is this rank's part of it. Raises ValueError on other shapes.
        """
        return _KeyConvolutionFunction.apply(self, k, weight)  # pyright: ignore[reportReturnType]


class _KeyConvolutionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planned: KeyConvolution, k: Tensor, weight: Tensor) -> Tensor:
        halo = planned.halo.fetch(k, planned.channel, kind="halo")
        ctx.save_for_backward(k, halo, weight)
        ctx.planned = planned
        return convolve(k, halo, weight, planned.taps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, halo, weight = ctx.saved_tensors
        dk, dhalo, dweight = convolve_backward(dout, k, halo, weight, ctx.planned.taps)
        ctx.planned.halo.return_gradients_(dk, dhalo, ctx.planned.channel, kind="halo_gradient")
        return None, dk.to(k.dtype), dweight.to(weight.dtype)
