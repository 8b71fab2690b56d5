"""Attention of a plan without a selection: a flash function called for its regions, partial results merged.

A flash function knows neither rows nor documents: a region is full, causal from its top-left corner, or has a mask.
An anticausal region becomes a causal one by reversing its rows. Regions of one shape at equal distances, such as the
chunks of a window or documents of one length, go into one call as a strided view (`_RegionBatch`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import copy_to
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.planning.plan import HeadPlan, Plan
from farspan.kernels.planning.regions import Kind, Region

ROWS_AT_ONCE = 1 << 13
"""Query rows of small regions that one call takes together: bounds the memory of partial results."""

Gradients = tuple[Tensor, Tensor, Tensor]


class FlashForward(Protocol):
    """From q `[N, Hq, T, D]`, k `[N, Hk, S, D]`, v `[N, Hk, S, Dv]` to out `[N, Hq, T, Dv]` and lse `[N, Hq, T]`.

    causal: key j to query i iff j <= i. mask: bool `[T, S]`, True where visible.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class FlashBackward(Protocol):
    """From the same, dout, and an out and lse that may cover more keys, to (dq, dk, dv) in q's dtype or wider."""

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
    """Attention by a pair of flash functions; see `farspan.kernels.attention` for the shapes."""

    flash: FlashForward
    flash_backward: FlashBackward

    def prepare(self, plan: Plan, kv_heads: int, device: torch.device) -> None:
        """Make what both passes of a plan find on the device."""
        for part in plan.parts:
            if len(plan.parts) > 1:
                _index_of_heads(plan, part, kv_heads, device)
            if any(region.kind is Kind.MASKED for region in part.regions):
                plan.queries_on(device)
                plan.keys_on(device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""
        if len(plan.parts) == 1:
            return self._part_forward(q, k, v, plan, plan.parts[0])
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for part in plan.parts:
            heads, kv_heads = _index_of_heads(plan, part, k.shape[1], q.device)
            # [T, Hq, ..] -> [T, heads of the part, ..]; k and v are repeated for each of these heads
            part_out, part_lse = self._part_forward(q[:, heads], k[:, kv_heads], v[:, kv_heads], plan, part)
            out[:, heads], lse[:, heads] = part_out.to(out.dtype), part_lse
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> Gradients:
        """Return (dq, dk, dv); lse is finite."""
        if len(plan.parts) == 1:
            return self._part_backward(dout, q, k, v, out, lse, plan, plan.parts[0])
        dq, dk, dv = zeros(q, k, v)
        for part in plan.parts:
            heads, kv_heads = _index_of_heads(plan, part, k.shape[1], q.device)
            part_dout, part_q, part_out, part_lse = (x[:, heads] for x in (dout, q, out, lse))
            part_dq, part_dk, part_dv = self._part_backward(
                part_dout, part_q, k[:, kv_heads], v[:, kv_heads], part_out, part_lse, plan, part
            )
            dq[:, heads] = part_dq.to(dq.dtype)
            # Query heads that share a KV head: their gradients add up.
            dk.index_add_(1, kv_heads, part_dk.to(dk.dtype))
            dv.index_add_(1, kv_heads, part_dv.to(dv.dtype))
        return dq, dk, dv

    def _part_forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, part: HeadPlan) -> tuple[Tensor, Tensor]:
        batches = _batches_of(plan, part, q.device)
        if _is_single_region(plan, part):
            out, lse = self._forward_batch(q, k, v, next(batches))
            return out.squeeze(0), lse.squeeze(0)  # [1, T, Hq, ..] -> [T, Hq, ..]
        out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
        for batch in batches:
            part_out, part_lse = self._forward_batch(q, k, v, batch)
            merge_(batch.of_queries(out), batch.of_queries(lse), part_out, part_lse)
        return out, lse

    def _part_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, part: HeadPlan
    ) -> Gradients:
        batches = _batches_of(plan, part, q.device)
        if _is_single_region(plan, part):
            dq, dk, dv = self._backward_batch(dout, q, k, v, out, lse, next(batches))
            return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)  # [1, rows, ..] -> [rows, ..]
        dq, dk, dv = zeros(q, k, v)
        for batch in batches:
            part_dq, part_dk, part_dv = self._backward_batch(dout, q, k, v, out, lse, batch)
            batch.of_queries(dq).add_(part_dq)
            # Windows of neighboring regions overlap in keys: an in-place sum must not meet a key twice.
            for some in batch.apart():
                batch.of_keys(dk, some).add_(part_dk[some])
                batch.of_keys(dv, some).add_(part_dv[some])
        return dq, dk, dv

    def _forward_batch(self, q: Tensor, k: Tensor, v: Tensor, batch: "_RegionBatch") -> tuple[Tensor, Tensor]:
        """Return out `[regions, T, Hq, Dv]` and lse `[regions, T, Hq]`."""
        q, k, v = (batch.flip(_by_head(x)) for x in (batch.of_queries(q), batch.of_keys(k), batch.of_keys(v)))
        out, lse = self.flash(q, k, v, causal=batch.is_causal, mask=batch.mask)
        return _by_head(batch.flip(out)), batch.flip(lse).transpose(1, 2)  # [regions, Hq, T] -> [regions, T, Hq]

    def _backward_batch(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, batch: "_RegionBatch"
    ) -> Gradients:
        """Return dq `[regions, T, Hq, D]`, dk and dv `[regions, S, Hk, ..]`."""
        dout, q, out = (batch.flip(_by_head(batch.of_queries(x))) for x in (dout, q, out))
        k, v = (batch.flip(_by_head(batch.of_keys(x))) for x in (k, v))
        lse = batch.flip(batch.of_queries(lse).transpose(1, 2))  # [regions, T, Hq] -> [regions, Hq, T]
        gradients = self.flash_backward(dout, q, k, v, out, lse, causal=batch.is_causal, mask=batch.mask)
        dq, dk, dv = (_by_head(batch.flip(gradient)) for gradient in gradients)
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class _RegionBatch:
    """Regions of one kind and shape at equal distances, such as the chunks of a window: one call of flash.

    first: the first of `count` regions; queries and keys of each further one lie `query_step` and `key_step` rows on.
    Queries do not overlap. mask: of a single masked region, bool `[T, S]`.
    """

    first: Region
    count: int = 1
    query_step: int = 0
    key_step: int = 0
    mask: Tensor | None = None

    @property
    def is_causal(self) -> bool:
        return self.first.kind in (Kind.CAUSAL, Kind.ANTICAUSAL)

    def apart(self) -> Iterator[slice]:
        """Yield slices of the regions; those in one slice are so far apart that they share no keys."""
        num_keys = self.first.key_stop - self.first.key_start
        step = min(-(-num_keys // self.key_step), self.count) if self.key_step else self.count
        yield from (slice(start, self.count, step) for start in range(step))

    def of_queries(self, x: Tensor) -> Tensor:
        """The regions' queries as a view `[regions, T, ...]` of x `[rows, ...]`."""
        return self._view(x, self.first.queries, self.query_step, slice(0, self.count, 1))

    def of_keys(self, x: Tensor, some: slice | None = None) -> Tensor:
        """The keys of the regions, or of `some` of them, as a view `[regions, S, ...]` of x `[rows, ...]`."""
        return self._view(x, self.first.keys, self.key_step, some or slice(0, self.count, 1))

    def flip(self, x: Tensor) -> Tensor:
        """Reverse the rows of x `[regions, heads, rows, ...]` where that makes the regions causal, and back."""
        return x.flip(2) if self.first.kind is Kind.ANTICAUSAL else x

    def _view(self, x: Tensor, rows: slice, step: int, some: slice) -> Tensor:
        first = x[rows.start + some.start * step : rows.stop + some.start * step]
        count = len(range(some.start, some.stop, some.step))
        # [rows, ...] -> [regions, rows of a region, ...] without a copy: regions `step` rows apart may overlap.
        return first.as_strided((count, *first.shape), (some.step * step * x.stride(0), *first.stride()))


def _batches_of(plan: Plan, part: HeadPlan, device: torch.device) -> Iterator[_RegionBatch]:
    """Yield a part's regions by calls of flash, in no particular order."""
    by_shape: dict[tuple[Kind, int, int], list[Region]] = {}
    for region in part.regions:
        num_queries, num_keys = region.query_stop - region.query_start, region.key_stop - region.key_start
        by_shape.setdefault((region.kind, num_queries, num_keys), []).append(region)
    for (kind, num_queries, _), regions in by_shape.items():
        if kind is Kind.MASKED:
            # Masks differ from region to region.
            queries, keys = plan.queries_on(device), plan.keys_on(device)
            for x in regions:
                mask = part.attention_mask.mask(queries.slice(x.queries), keys.slice(x.keys))
                yield _RegionBatch(x, mask=mask)
            continue
        most = max(ROWS_AT_ONCE // num_queries, 1)
        batch = _RegionBatch(regions[0])
        for region in regions[1:]:
            steps = region.query_start - batch.first.query_start, region.key_start - batch.first.key_start
            if batch.count == 1 and most > 1 and steps[0] >= num_queries and steps[1] >= 0:
                batch = _RegionBatch(batch.first, 2, *steps)
            elif 1 < batch.count < most and steps == (batch.count * batch.query_step, batch.count * batch.key_step):
                batch = replace(batch, count=batch.count + 1)
            else:
                yield batch
                batch = _RegionBatch(region)
        yield batch


def zeros(*like: Tensor) -> Gradients:
    """Zeros like three tensors, in their accumulation dtype."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in like)
    return dq, dk, dv


def _index_of_heads(plan: Plan, part: HeadPlan, num_kv_heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The part's query heads and the KV head of each, int64, copied to a device once."""

    def make() -> tuple[Tensor, Tensor]:
        heads = torch.tensor(part.heads)
        index = copy_to(torch.stack((heads, heads // (plan.heads // num_kv_heads))), device)
        return index[0], index[1]

    return once(plan.shared, ("heads", part.heads, num_kv_heads, device), make)


def _is_single_region(plan: Plan, part: HeadPlan) -> bool:
    """Whether one region holds all rows and keys, so that nothing has to be merged."""
    if len(part.regions) != 1:
        return False
    region = part.regions[0]
    return region.queries == slice(0, len(plan.queries)) and region.keys == slice(0, len(plan.keys))


def _by_head(x: Tensor) -> Tensor:
    """From `[regions, rows, heads, width]` to `[regions, heads, rows, width]`, or back."""
    return x.transpose(1, 2)
