"""Merging attention over disjoint key sets by log-sum-exp."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results of `dtype` inputs are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_partial(queries: int, heads: int, value_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention to no key at all: out 0 `[queries, heads, value_dim]`, lse -inf."""
    dtype = accumulation_dtype(like.dtype)
    out = torch.zeros(queries, heads, value_dim, dtype=dtype, device=like.device)
    lse = torch.full((queries, heads), float("-inf"), dtype=dtype, device=like.device)
    return out, lse


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial result over other keys into (out, lse), in place.

    L = logaddexp(L1, L2), O = exp(L1 - L) O1 + exp(L2 - L) O2 (FlashAttention, arXiv 2205.14135, section 3.1).
    out `[queries, heads, value_dim]` and lse `[queries, heads]` are float32 or float64; part_out may be of any dtype.
    Rows that saw no key on either side stay out 0, lse -inf.
    """
    merged = torch.logaddexp(lse, part_lse)
    # exp(-inf - -inf) is NaN: a row that has seen nothing yet gets weight exp(-inf - 0) = 0 instead.
    base = merged.masked_fill(merged == float("-inf"), 0.0)
    out.mul_((lse - base).exp_().unsqueeze(-1))
    out.addcmul_(part_out.to(out.dtype), (part_lse - base).exp_().unsqueeze(-1))
    lse.copy_(merged)
