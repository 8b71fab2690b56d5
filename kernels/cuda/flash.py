"""Attention of a region by the fastest library that is installed, with what it cannot do kept away from it.

The traps are in `library.py`. So causal regions are cut into squares; keys of grouped heads are repeated, and their
gradients summed here, in float32; head sizes are padded with zeros; regions with a mask, which are small, are computed
here, by the formula.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.cuda.operators import Cudnn, Gradients, Library, TorchFlash
from farspan.kernels.cuda.packages import FlashAttn2, FlashAttn3, FlashAttn4

WIDEST = TorchFlash.widest
MULTIPLE = 8

# What others measured on an H100, TFLOP/s forward and backward (causal, 32K tokens, head size 128): FlashAttention 3
# 679 and 585, cuDNN 607 and 517, FlashAttention 2 366 and 330; FlashAttention 4 is said to come close to 3.
FASTEST_FIRST: dict[int, tuple[type[Library], ...]] = {
    9: (FlashAttn3, Cudnn, FlashAttn4, FlashAttn2, TorchFlash),
    10: (FlashAttn4, Cudnn, FlashAttn2, TorchFlash),
}
"""By the generation of a GPU; the last one takes every region."""
ELSEWHERE: tuple[type[Library], ...] = (FlashAttn2, TorchFlash)
"""Other generations, where torch prefers FlashAttention 2 to cuDNN too."""


def generation(device: torch.device) -> int:
    """Return the generation of a GPU, its major compute capability: 8 is Ampere, 9 Hopper, 10 Blackwell."""
    return torch.cuda.get_device_capability(device)[0]


def installed(device: torch.device) -> list[Library]:
    """Return the libraries that there are for a GPU, the fastest first."""
    found = [library.find() for library in FASTEST_FIRST.get(generation(device), ELSEWHERE)]
    return [library for library in found if library is not None]


def choose(libraries: list[Library], queries: int, keys: int, width: int) -> Library:
    """Return the first of the libraries that takes a region of this size."""
    return next(x for x in libraries if width <= x.widest and min(queries, keys) >= x.fewest)


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.planning.region_attention.FlashForward`; bfloat16 or float16, head sizes up to WIDEST."""
    if mask is not None:
        return _masked(q, k, v, mask)
    group, scale, width = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, _width(q, v)
    libraries = installed(q.device)
    query, key, value = (_fit(x, heads, width) for x, heads in ((q, 1), (k, group), (v, group)))
    parts = []
    for rows, keys, is_triangle in _squares(q.shape[2], k.shape[2], causal):
        library = choose(libraries, rows.stop - rows.start, keys.stop, width)
        parts.append(
            library.forward(query[:, :, rows], key[:, :, keys], value[:, :, keys], causal=is_triangle, scale=scale)
        )
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out[..., : v.shape[-1]], lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> Gradients:
    """See `farspan.kernels.planning.region_attention.FlashBackward`; gradients in float32."""
    out, dout = out.to(q.dtype), dout.to(q.dtype)
    if mask is not None:
        return _masked_backward(dout, q, k, v, out, lse, mask)
    group, scale, width = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, _width(q, v)
    libraries = installed(q.device)
    query, dout, out = (_fit(x, 1, width) for x in (q, dout, out))
    key, value = (_fit(x, group, width) for x in (k, v))
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (query, key, value))
    for rows, keys, is_triangle in _squares(q.shape[2], k.shape[2], causal):
        of_rows = (x[:, :, rows].contiguous() for x in (dout, query, out, lse))
        my_dout, my_q, my_out, my_lse = of_rows
        library = choose(libraries, rows.stop - rows.start, keys.stop, width)
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
