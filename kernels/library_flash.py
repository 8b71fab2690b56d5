"""Fused attention of torch for CUDA, by cuDNN or FlashAttention, with what they cannot do kept away from them.

Their traps: causal masks of unequal lengths (cuDNN aligns them top left, FlashAttention bottom right, so they only see
squares), grouped heads (gradients of a KV head are summed in 16 bits, so its keys are repeated and summed here, in
float32), head sizes that are no multiple of 8 or differ between keys and values (padded with zeros), a single key
(cuDNN refuses it), masks (computed here, by the formula: regions with one are small).
"""

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256
"""Largest head size that FlashAttention takes."""
CUDNN_WIDEST = 128
CUDNN_FEWEST = 64
"""Queries or keys from which on cuDNN is asked: short ones are where its versions differ in what they take."""
CUDNN_VERSION = 90000
MULTIPLE = 8

Gradients = tuple[Tensor, Tensor, Tensor]


class Library(ABC):
    """A fused operator: heads are not grouped, all of one size, and causal means a square."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Return out `[N, H, T, D]` and lse, float32 `[N, H, T]`, of q `[N, H, T, D]` and k, v `[N, H, S, D]`."""

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        """Return (dq, dk, dv) in the dtype of q, from an out and lse that may be of more keys."""


@final
class TorchFlash(Library):
    """torch's FlashAttention 2."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        # State of a random generator that is asked for nothing, as there is no dropout.
        seed, unused = (torch.zeros(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, unused, scale=scale
        )


@final
class Cudnn(Library):
    """cuDNN, through torch; its lse is `[N, H, T, 1]`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
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


def choose(queries: int, keys: int, width: int) -> Library:
    """Return the faster of those that take a region of this size: cuDNN on Hopper, wherever it may."""
    modern = (torch.backends.cudnn.version() or 0) >= CUDNN_VERSION
    return Cudnn() if modern and width <= CUDNN_WIDEST and min(queries, keys) >= CUDNN_FEWEST else TorchFlash()


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.region_attention.FlashForward`; bfloat16 or float16, head sizes up to WIDEST."""
    if mask is not None:
        return _masked(q, k, v, mask)
    group, scale, width = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, _width(q, v)
    query, key, value = (_fit(x, heads, width) for x, heads in ((q, 1), (k, group), (v, group)))
    parts = []
    for rows, keys, is_triangle in _squares(q.shape[2], k.shape[2], causal):
        library = choose(rows.stop - rows.start, keys.stop, width)
        parts.append(
            library.forward(query[:, :, rows], key[:, :, keys], value[:, :, keys], causal=is_triangle, scale=scale)
        )
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out[..., : v.shape[-1]], lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> Gradients:
    """See `farspan.kernels.region_attention.FlashBackward`; gradients in float32."""
    out, dout = out.to(q.dtype), dout.to(q.dtype)
    if mask is not None:
        return _masked_backward(dout, q, k, v, out, lse, mask)
    group, scale, width = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, _width(q, v)
    query, dout, out = (_fit(x, 1, width) for x in (q, dout, out))
    key, value = (_fit(x, group, width) for x in (k, v))
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (query, key, value))
    for rows, keys, is_triangle in _squares(q.shape[2], k.shape[2], causal):
        of_rows = (x[:, :, rows].contiguous() for x in (dout, query, out, lse))
        my_dout, my_q, my_out, my_lse = of_rows
        library = choose(rows.stop - rows.start, keys.stop, width)
        found = library.backward(
            my_dout, my_q, key[:, :, keys], value[:, :, keys], my_out, my_lse, causal=is_triangle, scale=scale
        )
        dq[:, :, rows] += found[0]
        dk[:, :, keys] += found[1]
        dv[:, :, keys] += found[2]
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _squares(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice, bool]]:
    """Cut a region into (queries, keys, is a triangle): causal ones into a triangle and queries that see all keys."""
    if not causal:
        return [(slice(0, queries), slice(0, keys), False)]
    edge = min(queries, keys)
    triangle = (slice(0, edge), slice(0, edge), True)
    return [triangle] if queries == edge else [triangle, (slice(edge, queries), slice(0, keys), False)]


def _width(q: Tensor, v: Tensor) -> int:
    return -(-max(q.shape[-1], v.shape[-1]) // MULTIPLE) * MULTIPLE


def _fit(x: Tensor, group: int, width: int) -> Tensor:
    """Return x with each head `group` times, and zeros up to `width`."""
    x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return scaled scores `[N, Hq, T, S]` in float32, -inf where invisible."""
    key = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.float() @ key.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf"))


def _probability(scores: Tensor, lse: Tensor) -> Tensor:
    """Return exp(score - lse): 0 for a row that sees nothing, where -inf - -inf would give NaN."""
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, mask)
    lse = scores.logsumexp(dim=-1)
    return _probability(scores, lse) @ v.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1), lse


def _masked_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor
) -> Gradients:
    """FlashAttention (arXiv 2205.14135) appendix B.2: dS = P * (dO V^T - rowsum(dO * O))."""
    group = q.shape[1] // k.shape[1]
    probability = _probability(_scores(q, k, mask), lse)
    dout, query = dout.float(), q.float()
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    delta = (dout * out.float()).sum(dim=-1, keepdim=True)
    dscores = probability * (dout @ value.transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
    dk, dv = dscores.transpose(-1, -2) @ query, probability.transpose(-1, -2) @ dout
    return dscores @ key, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)
