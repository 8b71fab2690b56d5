"""torch's flash attention operator for CPU, behind wrappers that avoid its traps.

The operator takes float64 to bfloat16, grouped heads, unequal lengths, and in its backward an external out and lse.
Its traps: -inf masks (fully masked rows would return lse 0, so masks are -1e30), empty inputs (the process dies), a
non-contiguous inner dimension (silently wrong), value heads of another size (refused, so the shorter of the two is
padded with zeros), and gradients summed in the dtype of its inputs (so 16-bit inputs are widened first).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.merge import accumulation_dtype, merge_

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MASKED_SCORE = -1e30
SLICE = 768
"""Queries from which on the operator multiplies in slices of 256, its fastest; below, of 64 and 32."""
LARGEST_CUT = 2048
"""Largest causal square that is cut into halves."""


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out `[N, Hq, T, Dv]` and lse `[N, Hq, T]` of q `[N, Hq, T, D]`, k `[N, Hk, S, D]`, v `[N, Hk, S, Dv]`.

    causal: key j to query i iff j <= i. mask: bool `[T, S]` or `[N, 1, T, S]`, True where visible. Rows that see
    nothing have out 0 and lse -inf. N, T and S must be positive.
    """
    if mask is not None:
        out, lse = _call(q, k, v, causal=False, mask=mask)
        blind = ~mask.any(dim=-1)  # [T] or [N, 1, T]
        return out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, float("-inf"))
    if not causal:
        out, lse = _call(_by_group(q, k.shape[1]), k, v, causal=False, mask=None)
        # [N, Hk, group x T, ..] -> [N, Hq, T, ..]
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])
    if not _is_cut(q, k):
        return _call(q, k, v, causal=True, mask=None)
    # The two triangles on the diagonal as one batch, then the square below it: later queries on earlier keys.
    half = q.shape[2] // 2
    halves = flash(_halves(q), _halves(k), _halves(v), causal=True, mask=None)
    out, lse = (_join_halves(x, len(q)) for x in halves)
    later = flash(q[:, :, half:], k[:, :, :half], v[:, :, :half], causal=False, mask=None)
    merge_(out[:, :, half:], lse[:, :, half:], *later)
    return out, lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) in the accumulation dtype; shapes as in `flash`, lse finite."""
    if mask is not None or (causal and not _is_cut(q, k)):
        return _call_backward(dout, q, k, v, out, lse, causal=causal, mask=mask)
    if not causal:
        grouped_dout, grouped_q, grouped_out, grouped_lse = (_by_group(x, k.shape[1]) for x in (dout, q, out, lse))
        dq, dk, dv = _call_backward(grouped_dout, grouped_q, k, v, grouped_out, grouped_lse, causal=False, mask=None)
        return dq.reshape(q.shape), dk, dv  # [N, Hk, group x T, D] -> [N, Hq, T, D]
    half = q.shape[2] // 2
    halves = flash_backward(*(_halves(x) for x in (dout, q, k, v, out, lse)), causal=True, mask=None)
    dq, dk, dv = (_join_halves(x, len(q)) for x in halves)
    late_dout, late_q, late_out, late_lse = (x[:, :, half:] for x in (dout, q, out, lse))
    square = flash_backward(
        late_dout, late_q, k[:, :, :half], v[:, :, :half], late_out, late_lse, causal=False, mask=None
    )
    dq[:, :, half:] += square[0]
    dk[:, :, :half] += square[1]
    dv[:, :, :half] += square[2]
    return dq, dk, dv


def _is_cut(q: Tensor, k: Tensor) -> bool:
    """Whether a causal square is cut into two triangles half as large and the square between them."""
    size = q.shape[2]
    # At its diagonal the operator computes up to 512 masked keys: much of a small square, little of a large one. The
    # smallest are slow as halves; 16-bit halves would be rounded before they are merged.
    fits = size == k.shape[2] and size % 2 == 0 and SLICE <= 2 * size <= 2 * LARGEST_CUT
    return fits and q.dtype == accumulation_dtype(q.dtype)


def _halves(x: Tensor) -> Tensor:
    """`[N, heads, rows, ...]` -> `[2 N, heads, rows / 2, ...]`."""
    # -> [N, heads, 2, rows / 2, ...] -> [N, 2, heads, rows / 2, ...] -> [2 N, ...]
    return x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)


def _join_halves(x: Tensor, count: int) -> Tensor:
    """The inverse of `_halves`: `[2 N, heads, rows / 2, ...]` -> `[N, heads, rows, ...]`, N = `count`."""
    return x.unflatten(0, (count, 2)).transpose(1, 2).flatten(2, 3)


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """`[N, Hq, T, ...]` -> `[N, Hk, group x T, ...]` where T is small: more rows that share their keys."""
    if x.shape[2] >= SLICE or x.shape[1] == kv_heads:
        return x
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _call(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    width = max(q.shape[-1], v.shape[-1])
    out, lse = _flash(
        *(_widen(x, width) for x in (q, k, v)), 0.0, causal,
        attn_mask=_additive(mask, q.dtype), scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return out[..., : v.shape[-1]], lse  # [N, Hq, T, max(D, Dv)] -> [N, Hq, T, Dv]


def _call_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, width = accumulation_dtype(q.dtype), max(q.shape[-1], v.shape[-1])
    dout, query, key, value, out = (_widen(x.to(dtype), width) for x in (dout, q, k, v, out))
    dq, dk, dv = _flash_backward(
        dout, query, key, value, out, lse, 0.0, causal, attn_mask=_additive(mask, dtype), scale=q.shape[-1] ** -0.5
    )
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=accumulation_dtype(dtype)).masked_fill_(~mask, MASKED_SCORE)


def _widen(x: Tensor, width: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
