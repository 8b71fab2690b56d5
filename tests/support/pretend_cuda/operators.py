"""Operators that only CUDA has, in the arithmetic of a CPU, and those that make the host wait."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return out, in the dtype of q `[..., H, T, D]`, and lse, float32 `[..., H, T]`; heads of k may be fewer."""
    scores, value = _scores(q, k, causal, scale), _repeated(v, q)
    lse = torch.logsumexp(scores, -1)
    return (torch.softmax(scores, -1).nan_to_num() @ value).to(q.dtype), lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv; out and lse may be over more keys."""
    group = q.shape[-3] // k.shape[-3]
    probability = (_scores(q, k, causal, scale) - lse.unsqueeze(-1)).exp()
    grad = dout.float()
    delta = (grad * out.float()).sum(-1, keepdim=True)
    dscores = probability * (grad @ _repeated(v, q).mT - delta) * (q.shape[-1] ** -0.5 if scale is None else scale)
    dk, dv = (
        x.unflatten(-3, (-1, group)).sum(-3) for x in (dscores.mT @ q.float(), probability.mT @ grad)
    )  # [..., H, S, D] -> [..., Hk, S, D]
    return (dscores @ _repeated(k, q)).to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = q.float() @ _repeated(k, q).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if not causal:
        return scores
    # Aligned at the last query and key.
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(scores.shape[-1] - scores.shape[-2])
    return scores.masked_fill(~seen, -math.inf)


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout=0.0, causal=False, debug=False, *, scale=None) -> tuple[Any, ...]:
    out, lse = attention(q, k, v, causal, scale)
    state = torch.zeros((), dtype=torch.int64)
    return out, lse, None, None, q.shape[2], k.shape[2], state, state, state


def _flash_backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale=None
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(dout, q, k, v, out, lse, causal, scale)


def _cudnn(q, k, v, bias, compute_lse, dropout=0.0, causal=False, debug=False, *, scale=None) -> tuple[Any, ...]:
    out, lse, *rest = _flash(q, k, v, causal=causal, scale=scale)
    return out, lse.unsqueeze(-1), *rest


def _cudnn_backward(
    dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale=None
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(dout, q, k, v, out, lse.squeeze(-1), causal, scale)


def _documents(cum_q: Tensor | None, cum_k: Tensor | None, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Return the rows of each document; of numbers that nobody knows, one document of all."""
    if cum_q is None or cum_k is None or q.is_meta:
        return [(slice(0, len(q)), slice(0, len(k)))]
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(cum_q.tolist()), pairwise(cum_k.tolist()), strict=True)]


def _varlen(
    q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug=False, *, scale=None, **_: Any
) -> tuple[Any, ...]:
    """q `[T, H, D]`, k, v `[S, Hk, D]`; lse `[H, T]`."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for rows, keys in _documents(cum_q, cum_k, q, k):
        part, lse[:, rows] = attention(
            q[rows].movedim(1, 0), k[keys].movedim(1, 0), v[keys].movedim(1, 0), causal, scale
        )
        out[rows] = part.movedim(0, 1)
    state = torch.zeros((), dtype=torch.int64)
    return out, lse, state, state, state


def _varlen_backward(
    dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale=None, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for rows, keys in _documents(cum_q, cum_k, q, k):
        grad, query, key, value, result = (
            x[of].movedim(1, 0) for x, of in ((dout, rows), (q, rows), (k, keys), (v, keys), (out, rows))
        )  # [H, rows, D]
        found = attention_backward(grad, query, key, value, result, lse[:, rows], causal, scale)
        dq[rows], dk[keys], dv[keys] = (x.movedim(0, 1) for x in found)
    return dq, dk, dv


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    normed = wide * inverse
    return (normed if weight is None else normed * weight.float()).to(x.dtype), inverse


def _rms_norm_backward(dout, x, shape, inverse, weight, wanted) -> tuple[Tensor, Tensor | None]:
    grad, normed = dout.float(), x.float() * inverse
    weighted = grad if weight is None else grad * weight.float()
    dx = inverse * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    dweight = None if weight is None else (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
    return dx.to(x.dtype), dweight


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def _mm_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(_mm(a, b, dtype))


def _addmm_out(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta=1, alpha=1, out: Tensor) -> Tensor:
    return out.copy_(beta * c + alpha * _mm(a, b, dtype))


ONLY_CUDA: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._flash_attention_forward.default: _varlen,
    aten._flash_attention_backward.default: _varlen_backward,
    aten._fused_rms_norm.default: _rms_norm,
    aten._fused_rms_norm_backward.default: _rms_norm_backward,
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm_out,
    aten.addmm.dtype_out: _addmm_out,
}
"""What operators are computed by that a CPU does not have."""

WAITS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.equal.default,
}
"""Operators whose result, or its size, the host waits for."""

FREE = {
    aten._unsafe_view.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Operators without work for the device, besides views."""


def waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether the host waits for the device in this operator."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        # One number put where a mask says is masked_fill.
        is_fill = func is not aten.index.Tensor and args[2].numel() == 1 and len(masks) == 1 and not any(args[3:])
        return bool(masks) and not is_fill
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if func is aten.segment_reduce.default:
        return not kwargs.get("unsafe", False)
    return func in WAITS
