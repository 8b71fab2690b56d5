"""Attention of a plan without a selection: a flash function called once per region, partial results merged.

A flash function knows neither rows nor documents: a region is full, causal from its top-left corner, or has a mask.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.plan import HeadPlan, Plan
from farspan.kernels.regions import Kind, Region

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashForward(Protocol):
    """From q `[N, Hq, T, D]`, k `[N, Hk, S, D]`, v `[N, Hk, S, Dv]` to out `[N, Hq, T, Dv]` and lse `[N, Hq, T]`.

    causal: key j to query i iff j <= i. mask: bool `[T, S]`, True where visible.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class FlashBackward(Protocol):
    """From the same, dout, and an out and lse that may be of more keys, to (dq, dk, dv) in q's dtype or wider."""

    def __call__(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
    ) -> Gradients: ...


@dataclass(frozen=True, slots=True)
class RegionAttention:
    """Attention by a pair of flash functions; see `farspan.kernels.attend` for the shapes."""

    flash: FlashForward
    flash_backward: FlashBackward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        if len(plan.parts) == 1:
            return self._part_forward(q, k, v, plan, plan.parts[0])
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for part in plan.parts:
            heads, kv_heads = _index_of_heads(part, q, k)
            found = self._part_forward(q[:, heads], k[:, kv_heads], v[:, kv_heads], plan, part)
            out[:, heads], lse[:, heads] = found[0].to(out.dtype), found[1]
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        """Return (dq, dk, dv); lse is finite."""
        if len(plan.parts) == 1:
            return self._part_backward(dout, q, k, v, out, lse, plan, plan.parts[0])
        dq, dk, dv = zeros(q, k, v)
        for part in plan.parts:
            heads, kv_heads = _index_of_heads(part, q, k)
            of_queries, of_keys = (x[:, heads] for x in (dout, q, out, lse)), (x[:, kv_heads] for x in (k, v))
            (my_dout, my_q, my_out, my_lse), (my_k, my_v) = of_queries, of_keys
            found = self._part_backward(my_dout, my_q, my_k, my_v, my_out, my_lse, plan, part)
            dq[:, heads] = found[0].to(dq.dtype)
            dk.index_add_(1, kv_heads, found[1].to(dk.dtype))
            dv.index_add_(1, kv_heads, found[2].to(dv.dtype))
        return dq, dk, dv

    def _part_forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, part: HeadPlan) -> tuple[Tensor, Tensor]:
        if _is_whole(plan, part):
            return self._region_forward(q, k, v, plan, part, part.regions[0])
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for region in part.regions:
            found = self._region_forward(q, k, v, plan, part, region)
            merge_(out[region.queries], lse[region.queries], *found)
        return out, lse

    def _part_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, part: HeadPlan
    ) -> Gradients:
        if _is_whole(plan, part):
            return self._region_backward(dout, q, k, v, out, lse, plan, part, part.regions[0])
        dq, dk, dv = zeros(q, k, v)
        for region in part.regions:
            part_dq, part_dk, part_dv = self._region_backward(dout, q, k, v, out, lse, plan, part, region)
            dq[region.queries] += part_dq
            dk[region.keys] += part_dk
            dv[region.keys] += part_dv
        return dq, dk, dv

    def _region_forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, part: HeadPlan, region: Region
    ) -> tuple[Tensor, Tensor]:
        operands = (_by_head(x) for x in (q[region.queries], k[region.keys], v[region.keys]))
        mask = _mask(plan, part, region, q.device)
        out, lse = self.flash(*operands, causal=region.kind is Kind.CAUSAL, mask=mask)
        return out.squeeze(0).transpose(0, 1), lse.squeeze(0).t()

    def _region_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        plan: Plan,
        part: HeadPlan,
        region: Region,
    ) -> Gradients:
        queries, keys = region.queries, region.keys
        gradients = self.flash_backward(
            _by_head(dout[queries]),
            _by_head(q[queries]),
            _by_head(k[keys]),
            _by_head(v[keys]),
            _by_head(out[queries]),
            lse[queries].t().unsqueeze(0),
            causal=region.kind is Kind.CAUSAL,
            mask=_mask(plan, part, region, q.device),
        )
        dq, dk, dv = (gradient.squeeze(0).transpose(0, 1) for gradient in gradients)
        return dq, dk, dv


def zeros(*like: Tensor) -> Gradients:
    """Return zeros of three shapes, in the accumulation dtype."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in like)
    return dq, dk, dv


def _index_of_heads(part: HeadPlan, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part's query heads and, for each, its KV head."""
    heads = torch.tensor(part.heads, device=q.device)
    return heads, heads // (q.shape[1] // k.shape[1])


def _is_whole(plan: Plan, part: HeadPlan) -> bool:
    """Whether one region holds all rows, so that nothing has to be merged."""
    if len(part.regions) != 1:
        return False
    region = part.regions[0]
    return region.queries == slice(0, len(plan.queries)) and region.keys == slice(0, len(plan.keys))


def _mask(plan: Plan, part: HeadPlan, region: Region, device: torch.device) -> Tensor | None:
    return plan.region_mask(part.visibility, region).to(device) if region.kind is Kind.MASKED else None


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)
