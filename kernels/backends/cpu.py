"""CPU backend: torch's flash attention for CPU, called for the regions of a plan, or for batches
of gathered rows.

Scans are matrix products over chunks of rows.
"""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.cpu.flash import flash, flash_backward
from farspan.kernels.cpu.linear_attention import chunked_recurrence
from farspan.kernels.linear_attention.recurrence import ChunkedRecurrentBackend
from farspan.kernels.merge import GatheredSums
from farspan.kernels.planning.gathered_batches import Batch, batches, choose_together
from farspan.kernels.planning.lifetime_batches import alive_batches
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.region_attention import Gradients, RegionAttention, zeros
from farspan.kernels.planning.regions import Kind

_REGIONS = RegionAttention(flash, flash_backward)


@final
class CpuBackend(Backend, ChunkedRecurrentBackend):
    """Time follows the visible area; memory is linear in the rows."""

    rank = 10

    def unavailable_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it calls torch's CPU flash attention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        if plan.selection is not None or plan.lifetime is not None:
            return _selected_forward(q, k, v, plan)
        return _REGIONS.forward(q, k, v, plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        # A row that sees nothing at all has lse -inf; exp(masked score - 0) is 0 for it, where -inf would give NaN.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        if plan.selection is not None or plan.lifetime is not None:
            return _selected_backward(dout, q, k, v, out, lse, plan)
        return _REGIONS.backward(dout, q, k, v, out, lse, plan)

    chunked_recurrence = staticmethod(chunked_recurrence)


def _selected_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    queries, keys, values = (_Gathered(x) for x in (q, k, v))
    sums = GatheredSums.empty(q.shape[0] * q.shape[1], v.shape[2], like=q)
    for batch in _batches(plan, k.shape[1]):
        operands = queries.take(batch.queries), keys.take(batch.keys), values.take(batch.keys)
        out, lse = flash(*operands, causal=batch.kind is Kind.CAUSAL, mask=_batch_mask(batch))
        _surplus(batch, lse).fill_(float("-inf"))
        sums.add(batch.queries.flatten().long(), out.flatten(0, 2), lse.flatten())
    out, lse = sums.merged()
    return out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])


def _selected_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> Gradients:
    gradients = zeros(q, k, v)
    totals = [gradient.flatten(0, 1) for gradient in gradients]
    of_queries, of_keys = [_Gathered(x) for x in (dout, q, out)], [_Gathered(x) for x in (k, v)]
    for batch in _batches(plan, k.shape[1]):
        my_dout, my_q, my_out = (x.take(batch.queries) for x in of_queries)
        my_k, my_v = (x.take(batch.keys) for x in of_keys)
        my_lse = lse.flatten().index_select(0, batch.queries.flatten()).view(my_q.shape[:3])
        _surplus(batch, my_lse).fill_(float("inf"))  # exp(score - inf) is 0: such a row gives gradients to nothing
        found = flash_backward(
            my_dout, my_q, my_k, my_v, my_out, my_lse, causal=batch.kind is Kind.CAUSAL, mask=_batch_mask(batch)
        )
        for total, rows, gradient in zip(totals, (batch.queries, batch.keys, batch.keys), found, strict=True):
            total.index_add_(0, rows.flatten().long(), gradient.flatten(0, 2))
    return gradients


class _Gathered:
    """Rows of a tensor `[tokens, heads, width]`, gathered for one batch after another into the same memory.

    Fresh memory for each would be handed back by the C library every time, and cost as many page faults again.
    """

    def __init__(self, x: Tensor) -> None:
        self.rows = x.flatten(0, 1)
        self.memory = x.new_empty(0, x.shape[2])

    def take(self, rows: Tensor) -> Tensor:
        """Return `[tasks, 1, R, width]` of rows `[tasks, R]`, each token x heads + head; valid until the next call."""
        if rows.numel() > len(self.memory):
            self.memory = self.memory.new_empty(rows.numel(), self.memory.shape[1])
        taken = self.memory[: rows.numel()]
        torch.index_select(self.rows, 0, rows.flatten(), out=taken)
        return taken.view(rows.shape[0], 1, rows.shape[1], -1)


def _batches(plan: Plan, kv_heads: int) -> Iterable[Batch]:
    """Return the batches of a plan; kept for the backward pass if they grow with the rows only, else made again."""
    if plan.lifetime is not None:
        return alive_batches(plan, kv_heads)
    if choose_together(plan):
        return batches(plan, kv_heads)
    if "batches" not in plan.derived:
        plan.derived["batches"] = list(batches(plan, kv_heads))
    return plan.derived["batches"]


def _surplus(batch: Batch, lse: Tensor) -> Tensor:
    """Return the log-sum-exps `[tasks, 1, R]` of the rows that only fill the last task up: of one, or of none."""
    return lse[-1, 0, lse.shape[2] - batch.surplus :]


def _batch_mask(batch: Batch) -> Tensor | None:
    return None if batch.mask is None else batch.mask.unsqueeze(1)


BACKENDS.add("cpu", CpuBackend())
