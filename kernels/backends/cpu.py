"""CPU backend: torch's flash attention for CPU, called for each region of a plan, or batch of its gathered rows."""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from farspan.kernels.alive import alive_batches
from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.cpu_flash import flash, flash_backward
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.plan import HeadPlan, Plan
from farspan.kernels.regions import Kind, Region
from farspan.kernels.tasks import Batch, batches

Gradients = tuple[Tensor, Tensor, Tensor]


@final
class CpuBackend(Backend):
    """Time follows the visible area; memory is linear in the rows."""

    rank = 10

    def refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it calls torch's CPU flash attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        if plan.selection is not None or plan.lifetime is not None:
            return _selected_forward(q, k, v, plan)
        if len(plan.parts) == 1:
            return _part_forward(q, k, v, plan, plan.parts[0])
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for part in plan.parts:
            heads, kv_heads = _index_of_heads(part, q, k)
            found = _part_forward(q[:, heads], k[:, kv_heads], v[:, kv_heads], plan, part)
            out[:, heads], lse[:, heads] = found[0].to(out.dtype), found[1]
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        # A row that sees nothing at all has lse -inf; exp(masked score - 0) is 0 for it, where -inf would give NaN.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        if plan.selection is not None or plan.lifetime is not None:
            return _selected_backward(dout, q, k, v, out, lse, plan)
        if len(plan.parts) == 1:
            return _part_backward(dout, q, k, v, out, lse, plan, plan.parts[0])
        dq, dk, dv = _zeros(q, k, v)
        for part in plan.parts:
            heads, kv_heads = _index_of_heads(part, q, k)
            of_queries, of_keys = (x[:, heads] for x in (dout, q, out, lse)), (x[:, kv_heads] for x in (k, v))
            (my_dout, my_q, my_out, my_lse), (my_k, my_v) = of_queries, of_keys
            found = _part_backward(my_dout, my_q, my_k, my_v, my_out, my_lse, plan, part)
            dq[:, heads] = found[0]
            dk.index_add_(1, kv_heads, found[1])
            dv.index_add_(1, kv_heads, found[2])
        return dq, dk, dv


def _zeros(*like: Tensor) -> Gradients:
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype)) for x in like)
    return dq, dk, dv


def _index_of_heads(part: HeadPlan, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part's query heads and, for each, its KV head."""
    heads = torch.tensor(part.heads)
    return heads, heads // (q.shape[1] // k.shape[1])


def _part_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, part: HeadPlan) -> tuple[Tensor, Tensor]:
    if _is_whole(plan, part):
        return _region_forward(q, k, v, plan, part, part.regions[0])
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    for region in part.regions:
        found = _region_forward(q, k, v, plan, part, region)
        merge_(out[region.queries], lse[region.queries], *found)
    return out, lse


def _part_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, part: HeadPlan
) -> Gradients:
    if _is_whole(plan, part):
        return _region_backward(dout, q, k, v, out, lse, plan, part, part.regions[0])
    dq, dk, dv = _zeros(q, k, v)
    for region in part.regions:
        part_dq, part_dk, part_dv = _region_backward(dout, q, k, v, out, lse, plan, part, region)
        dq[region.queries] += part_dq
        dk[region.keys] += part_dk
        dv[region.keys] += part_dv
    return dq, dk, dv


def _is_whole(plan: Plan, part: HeadPlan) -> bool:
    """Whether one region holds all rows, so that nothing has to be merged."""
    if len(part.regions) != 1:
        return False
    region = part.regions[0]
    return region.queries == slice(0, len(plan.queries)) and region.keys == slice(0, len(plan.keys))


def _region_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, part: HeadPlan, region: Region
) -> tuple[Tensor, Tensor]:
    operands = (_by_head(x) for x in (q[region.queries], k[region.keys], v[region.keys]))
    out, lse = flash(*operands, causal=region.kind is Kind.CAUSAL, mask=_mask(plan, part, region))
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).t()


def _region_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, part: HeadPlan, region: Region
) -> Gradients:
    queries, keys = region.queries, region.keys
    gradients = flash_backward(
        _by_head(dout[queries]),
        _by_head(q[queries]),
        _by_head(k[keys]),
        _by_head(v[keys]),
        _by_head(out[queries]),
        lse[queries].t().unsqueeze(0),
        causal=region.kind is Kind.CAUSAL,
        mask=_mask(plan, part, region),
    )
    dq, dk, dv = (gradient.squeeze(0).transpose(0, 1) for gradient in gradients)
    return dq, dk, dv


def _mask(plan: Plan, part: HeadPlan, region: Region) -> Tensor | None:
    return plan.region_mask(part.visibility, region) if region.kind is Kind.MASKED else None


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _batches(plan: Plan, kv_heads: int) -> Iterator[Batch]:
    return batches(plan, kv_heads) if plan.lifetime is None else alive_batches(plan, kv_heads)


def _selected_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))
    all_out, all_lse = out.flatten(0, 1), lse.flatten()
    for batch in _batches(plan, k.shape[1]):
        operands = (
            _gather(x, rows) for x, rows in ((queries, batch.queries), (keys, batch.keys), (values, batch.keys))
        )
        part_out, part_lse = flash(*operands, causal=batch.kind is Kind.CAUSAL, mask=_batch_mask(batch))
        index = batch.queries.flatten()
        my_out, my_lse = all_out[index], all_lse[index]
        merge_(my_out, my_lse, part_out.flatten(0, 2), part_lse.flatten())
        all_out.index_copy_(0, index, my_out)
        all_lse[index] = my_lse
    return out, lse


def _selected_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> Gradients:
    gradients = _zeros(q, k, v)
    totals = [gradient.flatten(0, 1) for gradient in gradients]
    of_queries, of_keys = [x.flatten(0, 1) for x in (dout, q, out)], [x.flatten(0, 1) for x in (k, v)]
    all_lse = lse.flatten()
    for batch in _batches(plan, k.shape[1]):
        my_dout, my_q, my_out = (_gather(x, batch.queries) for x in of_queries)
        my_k, my_v = (_gather(x, batch.keys) for x in of_keys)
        my_lse = all_lse[batch.queries].unsqueeze(1)
        found = flash_backward(
            my_dout, my_q, my_k, my_v, my_out, my_lse, causal=batch.kind is Kind.CAUSAL, mask=_batch_mask(batch)
        )
        for total, rows, gradient in zip(totals, (batch.queries, batch.keys, batch.keys), found, strict=True):
            total.index_add_(0, rows.flatten(), gradient.flatten(0, 2))
    return gradients


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of flat `[rows x heads, width]` as `[tasks, 1, rows, width]`."""
    return x.index_select(0, rows.flatten()).view(rows.shape[0], 1, rows.shape[1], -1)


def _batch_mask(batch: Batch) -> Tensor | None:
    return None if batch.mask is None else batch.mask.unsqueeze(1)


BACKENDS.add("cpu", CpuBackend())
