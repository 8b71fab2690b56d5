"""Merging attention over disjoint key sets by log-sum-exp."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results of `dtype` inputs are summed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_partial(queries: int, heads: int, value_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to no key at all: out 0 `[queries, heads, value_dim]`, lse -inf `[queries, heads]`."""
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
    # exp(-inf - -inf) is NaN: a row without keys so far gets weight exp(-inf - 0) = 0 instead.
    base = merged.masked_fill(merged == float("-inf"), 0.0)
    out.mul_((lse - base).exp_().unsqueeze(-1))
    out.addcmul_(part_out.to(out.dtype), (part_lse - base).exp_().unsqueeze(-1))
    lse.copy_(merged)


@dataclass(frozen=True, slots=True, eq=False)
class GatheredSums:
    """Partial attention results summed without normalizing after each part: one pass over a part's rows.

    A part weighs exp(its lse - base), where base is the lse of the row's first part, until a part outweighs it so far
    that sums might overflow (FlashAttention-4's rule: rescale rarely).
    total `[rows, Dv]`: sums of weight times out. weight, base `[rows]`; base is LOWEST for a row without parts.
    """

    total: Tensor
    weight: Tensor
    base: Tensor

    @classmethod
    def empty(cls, rows: int, value_dim: int, like: Tensor) -> Self:
        """Sums of no part at all, in the accumulation dtype of `like`."""
        total = torch.zeros(rows, value_dim, dtype=accumulation_dtype(like.dtype), device=like.device)
        return cls(total, total.new_zeros(rows), total.new_full((rows,), LOWEST))

    def add(self, index: Tensor, out: Tensor, lse: Tensor) -> None:
        """Add a part: out `[n, Dv]`, overwritten, and lse `[n]` of the rows `index` `[n]`, each row at most once."""
        excess = lse - self.base.index_select(0, index)
        heavy = excess > HEAVIEST
        if heavy.any():
            self._rebase(index.masked_select(heavy), lse.masked_select(heavy))
            excess = lse - self.base.index_select(0, index)
        weight = excess.exp_()
        self.weight.index_add_(0, index, weight)
        self.total.index_add_(0, index, out.to(self.total.dtype).mul_(weight.unsqueeze(-1)))

    def _rebase(self, rows: Tensor, base: Tensor) -> None:
        # Rows with parts shrink to the new base; the others have nothing to shrink.
        old = self.base.index_select(0, rows)
        self.base.index_copy_(0, rows, base)
        known = old > LOWEST
        rows, shrink = rows[known], (old - base)[known].exp_()
        self.weight[rows] *= shrink
        self.total[rows] *= shrink.unsqueeze(-1)

    def merged(self) -> tuple[Tensor, Tensor]:
        """(out `[rows, Dv]`, lse `[rows]`), 0 and -inf for rows without parts; overwrites the sums."""
        # tiny keeps 0 / 0 of rows without parts at 0
        out = self.total.div_(self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny).unsqueeze(-1))
        return out, self.base + self.weight.log_()


LOWEST = torch.finfo(torch.float32).min
"""The base before the first part: a difference to it is never NaN, not even that of a log-sum-exp of -inf."""
HEAVIEST = 40.0
"""Bound of lse - base: exp(40) times thousands of parts still fits into float32."""
