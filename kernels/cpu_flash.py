"""torch's flash attention for CPU, with what it does badly kept away from it.

The operator takes float64 to bfloat16, grouped heads, unequal lengths, and in its backward an external out and lse.
Its traps: an -inf mask (fully masked rows would return lse 0, so masks are -1e30), empty inputs (the process dies), an
inner dimension that is not contiguous (silently wrong), value heads of another size (refused, so the shorter of the
two is padded with zeros), and gradients summed in the dtype of its inputs (so 16 bits are widened before).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.merge import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MASKED_SCORE = -1e30


def flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out `[N, Hq, T, Dv]` and lse `[N, Hq, T]` of q `[N, Hq, T, D]`, k `[N, Hk, S, D]`, v `[N, Hk, S, Dv]`.

    causal: key j to query i iff j <= i. mask: bool `[T, S]` or `[N, 1, T, S]`, True where visible. Rows that see
    nothing have out 0 and lse -inf. None of N, T, S may be 0.
    """
    width = max(q.shape[-1], v.shape[-1])
    out, lse = _flash(
        *(_widen(x, width) for x in (q, k, v)), 0.0, causal,
        attn_mask=_additive(mask, q.dtype), scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    out = out[..., : v.shape[-1]]
    if mask is not None:
        blind = ~mask.any(dim=-1)
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, float("-inf"))
    return out, lse


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) in the accumulation dtype; shapes as in `flash`, lse finite."""
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
