"""CPU backend: torch's flash attention for CPU, called for the regions of a plan or for batches of gathered rows.

Linear attention is matrix products over chunks of rows.
"""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.caching import once
from farspan.kernels.cpu.flash import flash, flash_backward
from farspan.kernels.cpu.linear_attention import chunked_recurrence
from farspan.kernels.linear_attention.recurrence import ChunkedRecurrentBackend
from farspan.kernels.linear_attention.state import RecurrenceInputs, State
from farspan.kernels.merge import GatheredSums
from farspan.kernels.planning.gathered_batches import Batch, selection_batches, selects_by_tile
from farspan.kernels.planning.lifetime_batches import lifetime_batches
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
        # lse -inf, of a row that sees nothing, gives NaN; with 0 it is exp(masked score - 0) = 0.
        lse = lse.masked_fill(lse == float("-inf"), 0.0)
        if plan.selection is not None or plan.lifetime is not None:
            return _selected_backward(dout, q, k, v, out, lse, plan)
        return _REGIONS.backward(dout, q, k, v, out, lse, plan)

    def chunked_recurrence(self, inputs: RecurrenceInputs, *, reverse: bool) -> tuple[Tensor, State]:
        return chunked_recurrence(inputs, reverse=reverse)


def _selected_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    queries, keys, values = (_GatherBuffer(x) for x in (q, k, v))
    sums = GatheredSums.empty(q.shape[0] * q.shape[1], v.shape[2], like=q)
    for batch in _batches(plan, k.shape[1]):
        # Problems are the batch dimension of one head: [problems, 1, R or S, width].
        operands = queries.take(batch.queries), keys.take(batch.keys), values.take(batch.keys)
        out, lse = flash(*operands, causal=batch.kind is Kind.CAUSAL, mask=_batch_mask(batch))
        _filler(batch, lse).fill_(float("-inf"))  # weight exp(-inf) = 0 in the sums
        # [problems, 1, R, Dv] -> [problems * R, Dv], lse [problems, 1, R] -> [problems * R]
        sums.add(batch.queries.flatten().long(), out.flatten(0, 2), lse.flatten())
    out, lse = sums.merged()
    return out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2])  # [T * Hq, ..] -> [T, Hq, ..]


def _selected_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> Gradients:
    gradients = zeros(q, k, v)
    totals = [gradient.flatten(0, 1) for gradient in gradients]  # views [rows, heads, width] -> [rows * heads, width]
    of_queries, of_keys = [_GatherBuffer(x) for x in (dout, q, out)], [_GatherBuffer(x) for x in (k, v)]
    lse = lse.flatten()  # [T, Hq] -> [T * Hq]
    for batch in _batches(plan, k.shape[1]):
        batch_dout, batch_q, batch_out = (x.take(batch.queries) for x in of_queries)  # [problems, 1, R, ..]
        batch_k, batch_v = (x.take(batch.keys) for x in of_keys)  # [problems, 1, S, ..]
        batch_lse = lse.index_select(0, batch.queries.flatten()).view(batch_q.shape[:3])  # [problems, 1, R]
        _filler(batch, batch_lse).fill_(float("inf"))  # exp(score - inf) = 0: filler rows have no gradients
        parts = flash_backward(
            batch_dout, batch_q, batch_k, batch_v, batch_out, batch_lse,
            causal=batch.kind is Kind.CAUSAL, mask=_batch_mask(batch),
        )  # fmt: skip
        for total, rows, part in zip(totals, (batch.queries, batch.keys, batch.keys), parts, strict=True):
            total.index_add_(0, rows.flatten().long(), part.flatten(0, 2))  # [problems, 1, rows, width] -> [.., width]
    return gradients


class _GatherBuffer:
    """Gathers rows of a tensor `[tokens, heads, width]` for one batch after another into the same memory."""

    def __init__(self, x: Tensor) -> None:
        self.rows = x.flatten(0, 1)  # [tokens * heads, width]
        self.memory = x.new_empty(0, x.shape[2])

    def take(self, rows: Tensor) -> Tensor:
        """`[problems, 1, R, width]` of rows `[problems, R]`, each token * heads + head; valid until the next call."""
        # The C library returns fresh memory to the system each time, which would cost its page faults per batch.
        if rows.numel() > len(self.memory):
            self.memory = self.memory.new_empty(rows.numel(), self.memory.shape[1])
        gathered = self.memory[: rows.numel()]
        torch.index_select(self.rows, 0, rows.flatten(), out=gathered)
        return gathered.view(rows.shape[0], 1, rows.shape[1], -1)  # [problems * R, width] -> [problems, 1, R, width]


def _batches(plan: Plan, kv_heads: int) -> Iterable[Batch]:
    """The batches of a plan: cached for the backward pass, unless they grow faster than the rows."""
    if plan.lifetime is not None:
        return lifetime_batches(plan, kv_heads)
    # A tile's problem lists all its keys: rows x keys per tile in sum.
    if selects_by_tile(plan, count_padding=True):
        return selection_batches(plan, kv_heads)
    return once(plan.cache, "batches", lambda: list(selection_batches(plan, kv_heads)))


def _filler(batch: Batch, lse: Tensor) -> Tensor:
    """The filler rows at the end of the last problem, a view of lse `[problems, 1, R]`."""
    return lse[-1, 0, lse.shape[2] - batch.filler :]


def _batch_mask(batch: Batch) -> Tensor | None:
    return None if batch.mask is None else batch.mask.unsqueeze(1)  # [problems, R, S] -> [problems, 1, R, S]


BACKENDS.add("cpu", CpuBackend())
