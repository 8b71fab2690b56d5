"""CPU backend: torch's flash attention for CPU, called once for each region of the plan.

The operator takes float64 to bfloat16, grouped heads, unequal lengths, and in its backward an external out and lse.
What it does badly is kept away from it: an -inf mask (fully masked rows would return lse 0, so masks are -1e30),
empty inputs (the process dies), an inner dimension that is not contiguous (silently wrong), and value heads of
another size (refused, so the shorter of the two is padded with zeros).
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.plan import Kind, Plan, Region

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MASKED_SCORE = -1e30


@final
class CpuBackend(Backend):
    """Time follows the visible area; memory is linear in the rows."""

    rank = 10

    def refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it calls torch's CPU flash attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        if _is_whole(plan):
            return _region_forward(q, k, v, plan, plan.regions[0])
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for region in plan.regions:
            part_out, part_lse = _region_forward(q, k, v, plan, region)
            merge_(out[region.queries], lse[region.queries], part_out, part_lse)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        # A row that sees nothing at all has lse -inf; exp(masked score - 0) is 0 for it, where -inf would give NaN.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        if _is_whole(plan):
            return _region_backward(dout, q, k, v, out, lse, plan, plan.regions[0])
        dtype = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype) for x in (q, k, v))
        for region in plan.regions:
            part_dq, part_dk, part_dv = _region_backward(dout, q, k, v, out, lse, plan, region)
            dq[region.queries] += part_dq
            dk[region.keys] += part_dk
            dv[region.keys] += part_dv
        return dq, dk, dv


def _is_whole(plan: Plan) -> bool:
    """Whether one region holds all rows, so that nothing has to be merged."""
    if len(plan.regions) != 1:
        return False
    region = plan.regions[0]
    return region.queries == slice(0, len(plan.queries)) and region.keys == slice(0, len(plan.keys))


def _region_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, region: Region) -> tuple[Tensor, Tensor]:
    mask = _mask(plan, region)
    query, key, value, scale = _operands(q[region.queries], k[region.keys], v[region.keys])
    out, lse = _flash(
        query, key, value, 0.0, region.kind is Kind.CAUSAL, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    out, lse = _rows(out, v.shape[2]), lse.squeeze(0).t()
    if mask is not None:
        blind = ~mask.any(dim=1)
        out, lse = out.masked_fill(blind[:, None, None], 0.0), lse.masked_fill(blind[:, None], float("-inf"))
    return out, lse


def _region_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, region: Region
) -> tuple[Tensor, Tensor, Tensor]:
    # The operator sums dk and dv over query blocks and grouped heads in the dtype of its inputs: in 16 bits their error
    # would grow with the sequence.
    dtype = accumulation_dtype(q.dtype)
    query, key, value, scale = _operands(*(x.to(dtype) for x in (q[region.queries], k[region.keys], v[region.keys])))
    width = query.shape[-1]
    grad, merged = (_heads(_widen(x[region.queries].to(dtype), width)) for x in (dout, out))
    mask = _additive(_mask(plan, region), dtype)
    dq, dk, dv = _flash_backward(
        grad, query, key, value, merged, _heads_of_lse(lse[region.queries]), 0.0, region.kind is Kind.CAUSAL,
        attn_mask=mask, scale=scale,
    )  # fmt: skip
    return _rows(dq, q.shape[2]), _rows(dk, k.shape[2]), _rows(dv, v.shape[2])


def _mask(plan: Plan, region: Region) -> Tensor | None:
    return plan.mask(region) if region.kind is Kind.MASKED else None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=accumulation_dtype(dtype)).masked_fill_(~mask, MASKED_SCORE)


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return q, k, v as `[1, heads, rows, width]` of one width, and the softmax scale of the true head size."""
    width = max(q.shape[-1], v.shape[-1])
    return _heads(_widen(q, width)), _heads(_widen(k, width)), _heads(_widen(v, width)), q.shape[-1] ** -0.5


def _widen(x: Tensor, width: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _heads_of_lse(lse: Tensor) -> Tensor:
    return lse.t().unsqueeze(0)


def _rows(x: Tensor, width: int) -> Tensor:
    return x.squeeze(0).transpose(0, 1)[..., :width]


BACKENDS.add("cpu", CpuBackend())
