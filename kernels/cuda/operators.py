"""Libraries of fused attention: their interface, and torch's two for CUDA; the packages are in `packages.py`.

Common limits: causal masks of unequal lengths differ (cuDNN aligns them top left, FlashAttention bottom right, so they
only get squares), gradients of grouped heads may be summed in 16 bits (so keys come repeated), keys and values have one
head size, a multiple of 8 (so they come padded), and cuDNN refuses a single key.

Legend: N regions, H heads, T queries, S keys, D head size.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self, final

import torch
from torch import Tensor

aten = torch.ops.aten

DTYPES = (torch.bfloat16, torch.float16)
CUDNN_VERSION = 91501
"""Older ones have memory errors at lengths that are no multiple of 128 (github.com/pytorch/pytorch/issues/169849)."""

Gradients = tuple[Tensor, Tensor, Tensor]


class Library(ABC):
    """A fused operator for DTYPES: heads are not grouped, of one size, a multiple of 8, and causal means a square."""

    name: ClassVar[str]
    """Its name in reports."""
    widest: ClassVar[int]
    """Largest head size that it supports."""
    fewest: ClassVar[int] = 1
    """Fewest queries and fewest keys that it is called with."""

    @classmethod
    @abstractmethod
    def find(cls) -> Self | None:
        """Return the operator, or None where it is not installed or does not work."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return out `[N, H, T, D]` and lse, float32 `[N, H, T]`, of q `[N, H, T, D]` and k, v `[N, H, S, D]`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """Return (dq, dk, dv) in the dtype of q; out and lse may be over more keys than k."""


@final
class TorchFlash(Library):
    """torch's FlashAttention 2."""

    name = "torch's FlashAttention"
    widest = 256

    @classmethod
    def find(cls) -> Self:
        return cls()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        # The state of a random generator that is not used, as there is no dropout.
        seed, unused = (torch.zeros(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, unused, scale=scale
        )


@final
class Cudnn(Library):
    """cuDNN, through torch; its lse is `[N, H, T, 1]`."""

    name = "cuDNN"
    widest = 128
    # Its versions differ in the short lengths that they support.
    fewest = 64

    @classmethod
    def find(cls) -> Self | None:
        return cls() if (torch.backends.cudnn.version() or 0) >= CUDNN_VERSION else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
        # [N, H, T, 1] -> [N, H, T]
        return out, lse.view(q.shape[:3])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
        bias = cumulative = None
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.unsqueeze(-1), seed, offset, bias, cumulative, cumulative,
            q.shape[2], k.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip
