"""Libraries of fused attention: their interface, and torch's two for CUDA; the packages are in `packages.py`.

All but cuDNN compute many packed sequences in one call. Common limits: keys and values have one head size, a multiple
of 8 (so they come padded). cuDNN is asked for single sequences: through torch it has no packed sequences with grouped
heads, aligns causal masks top left (so it gets squares and rectangles), and refuses a single key.

Legend: T queries and S keys of all sequences, Hq query heads, Hk KV heads, D head size.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from farspan.kernels.merge import merge_

aten = torch.ops.aten

DTYPES = (torch.bfloat16, torch.float16)
CUDNN_VERSION = 91501
"""Older ones have memory errors at lengths that are no multiple of 128 (github.com/pytorch/pytorch/issues/169849)."""

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lengths:
    """Where packed sequences begin and end, int32 `[sequences + 1]` on the device, and the most rows of one."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    @staticmethod
    def equal(sequences: int, queries: int, keys: int, device: torch.device) -> "Lengths":
        """Return those of sequences of one size."""
        starts = (
            torch.arange(0, (sequences + 1) * size, size, dtype=torch.int32, device=device) for size in (queries, keys)
        )
        return Lengths(queries=next(starts), keys=next(starts), most_queries=queries, most_keys=keys)


class Library(ABC):
    """A fused operator for DTYPES, of packed sequences without empty ones; causal masks are aligned bottom right."""

    name: ClassVar[str]
    """Its name in reports."""
    widest: ClassVar[int]
    """Largest head size that it supports."""

    @classmethod
    @abstractmethod
    def find(cls) -> Self | None:
        """Return the operator, or None where it is not installed or does not work."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out `[T, Hq, D]` and lse, float32 `[Hq, T]`, of q `[T, Hq, D]` and k, v `[S, Hk, D]`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, *,
        causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        """Return (dq, dk, dv) in the dtype of q; out and lse may be over more keys than k; lse is contiguous."""


@final
class TorchFlash(Library):
    """torch's FlashAttention 2."""

    name = "torch's FlashAttention"
    widest = 256

    @classmethod
    def find(cls) -> Self:
        return cls()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        sequences = lengths.queries, lengths.keys, lengths.most_queries, lengths.most_keys
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *sequences, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths, *,
        causal: bool, scale: float,
    ) -> Gradients:  # fmt: skip
        # The state of a random generator, which nothing reads, as there is no dropout.
        seed, unused = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        sequences = lengths.queries, lengths.keys, lengths.most_queries, lengths.most_keys
        return aten._flash_attention_backward(
            dout, q, k, v, out, lse, *sequences, 0.0, causal, seed, unused, scale=scale
        )


@final
class Cudnn:
    """cuDNN, through torch, for one sequence; it makes a plan for each new shape, which takes about a second.

    torch 2.11 on a B200: 0.44 s forward and 0.55 s backward, kept forever (github.com/modelscope/FunASR/issues/3704).
    """

    name = "cuDNN"
    widest = 128
    fewest = 64
    """Fewest queries and fewest keys: its versions differ in the short lengths that they support."""

    @classmethod
    def find(cls) -> Self | None:
        return cls() if (torch.backends.cudnn.version() or 0) >= CUDNN_VERSION else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return out `[T, Hq, D]`, in the dtype of q or float32, and lse, float32 `[Hq, T]`."""
        ahead = len(k) - len(q) if causal else 0
        out, lse = _cudnn_forward(q, k[ahead:], v[ahead:], causal, scale)
        if ahead:
            out, lse = out.float(), lse.t().contiguous()
            part_out, part_lse = _cudnn_forward(q, k[:ahead], v[:ahead], False, scale)
            merge_(out, lse, part_out, part_lse.t())
            lse = lse.t()
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """Return (dq, dk, dv) in the dtype of q or float32; out and lse may be over more keys than k."""
        ahead = len(k) - len(q) if causal else 0
        dq, dk, dv = _cudnn_backward(dout, q, k[ahead:], v[ahead:], out, lse, causal, scale)
        if ahead:
            part_dq, part_dk, part_dv = _cudnn_backward(dout, q, k[:ahead], v[:ahead], out, lse, False, scale)
            dq, dk, dv = dq.float() + part_dq, torch.cat((part_dk, dk)), torch.cat((part_dv, dv))
        return dq, dk, dv


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    query, key, value = _by_head(q, *_repeated(q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    # [1, Hq, T, D] -> [T, Hq, D], [1, Hq, T, 1] -> [Hq, T]
    return out.squeeze(0).transpose(0, 1), lse.view(lse.shape[1:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Gradients:
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    dout, query, key, value, out = _by_head(dout, q, *_repeated(q, k, v), out)
    bias = cumulative = None
    found = aten._scaled_dot_product_cudnn_attention_backward(
        dout, query, key, value, out, lse[None, ..., None], seed, offset, bias, cumulative, cumulative,
        query.shape[2], key.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x.squeeze(0).transpose(0, 1) for x in found)  # [1, Hq, rows, D] -> [rows, Hq, D]
    # [S, Hq, D] -> [S, Hk, Hq/Hk, D] -> [S, Hk, D]
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v `[S, Hk, D]` as `[S, Hq, D]`."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


def _by_head(*tensors: Tensor) -> list[Tensor]:
    # [rows, heads, D] -> [1, heads, rows, D]
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]
