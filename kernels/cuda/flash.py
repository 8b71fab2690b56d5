"""The fastest libraries that are installed for a GPU, and regions of a plan computed by them.

Their limits are listed in `operators.py`. So causal regions are cut into squares; head sizes are padded with zeros;
regions with a mask, which are small, are computed here, by the formula. Packed documents take no regions: `varlen.py`.

Legend: N regions of the same size, Hq query heads, Hk KV heads, T queries, S keys, D head size, Dv value head size,
W = the larger of D and Dv, rounded up to a multiple of 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.cuda.operators import Cudnn, Gradients, Lengths, Library, TorchFlash
from farspan.kernels.cuda.packages import FlashAttn2, FlashAttn3, FlashAttn4

WIDEST = TorchFlash.widest
MULTIPLE = 8

# TFLOP/s that their authors report on an H100, forward and backward (causal, 32K tokens, head size 128): FlashAttention
# 3 679 and 585, cuDNN 607 and 517, FlashAttention 2 366 and 330; FlashAttention 4 comes close to 3.
FASTEST_FIRST: dict[int, tuple[type[Library] | type[Cudnn], ...]] = {
    9: (FlashAttn3, Cudnn, FlashAttn4, FlashAttn2, TorchFlash),
    10: (FlashAttn4, Cudnn, FlashAttn2, TorchFlash),
}
"""By the generation of a GPU; the last one supports every region."""
ELSEWHERE: tuple[type[Library], ...] = (FlashAttn2, TorchFlash)
"""Other generations: torch, too, prefers FlashAttention 2 to cuDNN there."""


def generation(device: torch.device) -> int:
    """Return the generation of a GPU, its major compute capability: 8 is Ampere, 9 Hopper, 10 Blackwell."""
    return torch.cuda.get_device_capability(device)[0]


def installed(device: torch.device) -> list[Library | Cudnn]:
    """Return the libraries that are installed for a GPU, the fastest first."""
    found = [library.find() for library in FASTEST_FIRST.get(generation(device), ELSEWHERE)]
    return [library for library in found if library is not None]


def choose(libraries: list[Library | Cudnn], width: int) -> tuple[Cudnn | None, Library]:
    """Return the fastest of the libraries for packed sequences of a head size, and cuDNN if it is still faster."""
    able = [library for library in libraries if width <= library.widest]
    first = next(library for library in able if isinstance(library, Library))
    return (able[0] if isinstance(able[0], Cudnn) else None), first


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.planning.region_attention.FlashForward`; bfloat16 or float16, head sizes up to WIDEST."""
    scale, width = q.shape[-1] ** -0.5, width_of(q.shape[-1], v.shape[-1])
    if mask is not None:
        scores = _scores(q, k, mask)
        lse = scores.logsumexp(dim=-1)
        group = q.shape[1] // k.shape[1]
        return _probability(scores, lse) @ v.float().repeat_interleave(group, dim=1), lse
    _, library = choose(installed(q.device), width)
    parts = []
    for rows, keys, is_triangle in _squares(q.shape[2], k.shape[2], causal):
        query, key, value = (_packed(x, width) for x in (q[:, :, rows], k[:, :, keys], v[:, :, keys]))
        lengths = Lengths.equal(len(q), rows.stop - rows.start, keys.stop - keys.start, q.device)
        out, lse = library.forward(query, key, value, lengths, causal=is_triangle, scale=scale)
        # [N x T, Hq, W] -> [N, Hq, T, W], [Hq, N x T] -> [N, Hq, T]
        parts.append((_unpacked(out, len(q)), lse.unflatten(1, (len(q), -1)).transpose(0, 1)))
    # [N, Hq, T of a part, W] -> [N, Hq, T, W] -> [N, Hq, T, Dv]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return out[..., : v.shape[-1]], lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> Gradients:
    """See `farspan.kernels.planning.region_attention.FlashBackward`; gradients in float32."""
    out, dout = out.to(q.dtype), dout.to(q.dtype)
    if mask is not None:
        return _masked_backward(dout, q, k, v, out, lse, mask)
    scale, width = q.shape[-1] ** -0.5, width_of(q.shape[-1], v.shape[-1])
    _, library = choose(installed(q.device), width)
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for rows, keys, is_triangle in _squares(q.shape[2], k.shape[2], causal):
        of_rows = (_packed(x[:, :, rows], width) for x in (dout, q, out))
        row_dout, row_q, row_out = of_rows
        key, value = (_packed(x[:, :, keys], width) for x in (k, v))
        row_lse = lse[:, :, rows].transpose(0, 1).reshape(q.shape[1], -1).contiguous()  # [N, Hq, T] -> [Hq, N x T]
        lengths = Lengths.equal(len(q), rows.stop - rows.start, keys.stop - keys.start, q.device)
        found = library.backward(
            row_dout, row_q, key, value, row_out, row_lse, lengths, causal=is_triangle, scale=scale
        )
        # Libraries return 16 bits: each is rounded once, and their sum is float32.
        for total, part in zip((dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]), found, strict=True):
            total += _unpacked(part, len(q))[..., : total.shape[-1]]
    return dq, dk, dv


def _squares(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice, bool]]:
    """Cut a region into (queries, keys, is a triangle); a causal one by the number of queries T and of keys S.

    causal, T > S     triangle [0, S) x [0, S), then rectangle [S, T) x [0, S)
    causal, T <= S    triangle [0, T) x [0, T); no query attends to keys after T
    """
    if not causal:
        return [(slice(0, queries), slice(0, keys), False)]
    side = min(queries, keys)
    triangle = (slice(0, side), slice(0, side), True)
    return [triangle] if queries == side else [triangle, (slice(side, queries), slice(0, keys), False)]


def width_of(head_dim: int, value_dim: int) -> int:
    """Return the head size that libraries compute with, W."""
    return -(-max(head_dim, value_dim) // MULTIPLE) * MULTIPLE


def fit(x: Tensor, width: int) -> Tensor:
    """Return x `[..., D]` as `[..., width]`, padded with zeros."""
    x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _packed(x: Tensor, width: int) -> Tensor:
    # [N, heads, rows, D] -> [N, rows, heads, D] -> [N x rows, heads, W]
    return fit(x.transpose(1, 2).flatten(0, 1), width)


def _unpacked(x: Tensor, regions: int) -> Tensor:
    # [N x rows, heads, W] -> [N, rows, heads, W] -> [N, heads, rows, W]
    return x.unflatten(0, (regions, -1)).transpose(1, 2)


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return scaled scores `[N, Hq, T, S]` in float32, -inf where masked."""
    # [N, Hk, S, D] -> [N, Hq, S, D]
    key = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.float() @ key.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf"))


def _probability(scores: Tensor, lse: Tensor) -> Tensor:
    """Return exp(score - lse) `[N, Hq, T, S]`."""
    # 0 for a row that attends to nothing, where -inf - -inf would give NaN.
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()


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
    # [N, Hq, S, D or Dv], then [N, Hq, S, ...] -> [N, Hk, Hq/Hk, S, ...] -> [N, Hk, S, ...]
    dk, dv = dscores.transpose(-1, -2) @ query, probability.transpose(-1, -2) @ dout
    return dscores @ key, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)
