# pyright: reportMissingImports=false
"""Launches of the attention kernels: arguments of a plan on a device, and the order in which the kernels run.

Two schedules. In all plans but those that select blocks by single rows, tiles of consecutive queries visit tiles of
keys. In the others, rows of any heads that select a block are gathered into tiles that visit it; each leaves a partial
result in a slot of its own, and slots are merged in a fixed order. Either way no two programs add to the same row:
results have the same bits each time.

Legend: T queries, S keys, Hq query heads, Hk KV heads, D head size, Dv value head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.merge import empty_partial
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.triton_kernels import attention as kernels
from farspan.kernels.triton_kernels.block_mask import BlockMask, tile_plan
from farspan.kernels.triton_kernels.mask_terms import MaskTerms, mask_terms
from farspan.kernels.triton_kernels.row_block_lists import GatheredRows, gathered_rows, selects_by_row
from farspan.kernels.triton_kernels.tile import KernelPlan, Operand, padded

SLOT_BYTES = 1 << 29
"""Partial results that exist at the same time, where single rows select blocks."""
LOG2E = 1.4426950408889634
MAX_REGISTERS = 255
"""The most that a thread can have. Without this bound ptxas would rather spill a few than run one block less."""
DELTA_ROWS = 64
COMBINED_VALUES = 4096
"""32 for each thread of a program: at 64 rows of 256, registers spill."""


class Shape(NamedTuple):
    """Rows of a tile of queries and of keys, warps, and stages of the software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The shape of each kernel; dkv is key-stationary, so its queries are the side that changes at every step."""

    forward: Shape
    dq: Shape
    dkv: Shape
    dkv_in_turn: bool = False
    """dk first, then dv, each with scores of its own: registers do not hold both sums of heads this wide."""


# Found by compiling for an H100 (docs/kernels_sm90.md): large tiles whose registers do not spill for any kind of plan,
# in bfloat16 and in float16. The stationary side has 64 rows for each of two groups of 4 warps: with fewer, both
# groups compute the same scores. With three stages two loads are in flight during a step; with two, none is
# (docs/log.md). Keyed by the largest (head size, value head size). No timings yet.
_HALF = {
    (64, 64): Shapes(forward=Shape(128, 64, 8, 3), dq=Shape(128, 64, 8, 3), dkv=Shape(64, 128, 8, 3)),
    (128, 128): Shapes(forward=Shape(128, 64, 8, 3), dq=Shape(128, 64, 8, 3), dkv=Shape(32, 128, 8, 3)),
    (256, 128): Shapes(
        forward=Shape(128, 64, 8, 3), dq=Shape(128, 32, 8, 3), dkv=Shape(32, 128, 8, 3), dkv_in_turn=True
    ),
    (256, 256): Shapes(
        forward=Shape(128, 32, 8, 3), dq=Shape(128, 32, 8, 3), dkv=Shape(16, 128, 8, 3), dkv_in_turn=True
    ),
}
# Exact float32 products run on ordinary cores, from registers: for checks, not for speed.
_FLOAT32 = {
    (64, 64): Shapes(forward=Shape(32, 16, 4, 1), dq=Shape(16, 32, 4, 1), dkv=Shape(16, 16, 4, 1)),
    (256, 256): Shapes(forward=Shape(16, 16, 8, 2), dq=Shape(16, 16, 8, 2), dkv=Shape(16, 16, 8, 2), dkv_in_turn=True),
}


def shapes_for(width: int, value_width: int, dtype: torch.dtype) -> Shapes:
    """Return the shapes for head sizes of queries and keys, and of values."""
    table = _FLOAT32 if dtype == torch.float32 else _HALF
    return next(shapes for limits, shapes in table.items() if width <= limits[0] and value_width <= limits[1])


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return out `[T, Hq, Dv]` and lse `[T, Hq]`, float32, of q `[T, Hq, D]`, k `[S, Hk, D]`, v `[S, Hk, Dv]`."""
    plan, shape, scale = _with_lists(plan), shapes_for(q.shape[2], v.shape[2], q.dtype).forward, q.shape[2] ** -0.5
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    given = [Operand.of(x) for x in (q, k, v)]
    for rows, tiled in _schedule(q, k, v, plan, shape, "queries"):
        # [slots, Dv], [slots]
        part, part_lse = (out, lse) if rows is None else (rows.slots_like(out), lse.new_empty(len(rows.index)))
        programs = tiled.num_tiles * (q.shape[1] if rows is None else 1)
        _launch(kernels.forward_kernel, programs, *given, part, part_lse, tiled, scale * LOG2E, **_options(shape))
        if rows is not None:
            _combine(rows, part, part_lse, out, lse)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`, float32; out and lse may be over more keys."""
    plan, shapes, scale = _with_lists(plan), shapes_for(q.shape[2], v.shape[2], q.dtype), q.shape[2] ** -0.5
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
    base, delta = _delta(plan, dout, out, lse)
    # Both operands of a product have one dtype.
    given = *(Operand.of(x) for x in (q, k, v, dout.to(q.dtype))), base, delta
    for _, tiled in _schedule(q, k, v, plan, shapes.dkv, "keys"):
        for for_k, for_v in ((True, False), (False, True)) if shapes.dkv_in_turn else ((True, True),):
            _launch(
                kernels.dkv_kernel, tiled.num_tiles * k.shape[1], *given, dk, dv, tiled, scale * LOG2E, scale,
                **_options(shapes.dkv), FOR_K=for_k, FOR_V=for_v,
            )  # fmt: skip
    for rows, tiled in _schedule(q, k, v, plan, shapes.dq, "queries"):
        # [slots, D]
        part = dq if rows is None else rows.slots_like(dq)
        programs = tiled.num_tiles * (q.shape[1] if rows is None else 1)
        _launch(kernels.dq_kernel, programs, *given, part, tiled, scale * LOG2E, scale, **_options(shapes.dq))
        if rows is not None:
            _combine(rows, part, None, dq, None)
    return dq, dk, dv


def _with_lists(plan: Plan) -> Plan:
    """Return a plan whose selection, if any, is lists on the CPU; waits for the device."""
    selection = plan.selection
    if not isinstance(selection, PackedSelection):
        return plan
    return _once(plan, ("with lists",), lambda: plan.with_selection(selection.as_lists))


def _options(shape: Shape) -> dict[str, int]:
    """Return the tiles of the attention kernels, their warps and stages."""
    return {
        "BLOCK_Q": shape.queries,
        "BLOCK_K": shape.keys,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "maxnreg": MAX_REGISTERS,
    }


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start the programs of a kernel, if any."""
    if programs:
        kernel[(programs,)](*arguments, **options)


def _delta(plan: Plan, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return base and delta, float32 `[Hq, T]`; see `delta_kernel`."""
    queries, heads, _ = dout.shape
    base, delta = (torch.empty(heads, queries, dtype=torch.float32, device=dout.device) for _ in range(2))
    _launch(
        kernels.delta_kernel, triton.cdiv(queries, DELTA_ROWS) * heads, Operand.of(dout), Operand.of(out),
        lse.contiguous(), delta, base, _terms(plan, dout.device).q_document, queries, HEADS=heads, BLOCK=DELTA_ROWS,
    )  # fmt: skip
    return base, delta


def _schedule(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, shape: Shape, stationary: Literal["queries", "keys"]
) -> Iterator[tuple[GatheredRows | None, KernelPlan]]:
    """Yield the plan by lists of its stationary tiles: at once, or some gathered rows at a time, with these rows.

    The lists of a plan are made once. Gathered ones are made anew in each pass: every layer has such a plan, which
    would keep 8 bytes for each selected block.
    """
    device, selection, terms = q.device, plan.selection, _terms(plan, q.device)

    def kernel_plan(lists: BlockMask, q_index: Tensor | None, k_index: Tensor | None, gathered: bool) -> KernelPlan:
        constants = (tl.constexpr(value) for value in (q.shape[1], k.shape[1], gathered))
        return KernelPlan(q_index, k_index, terms, lists, len(q), len(k), len(lists.order), *constants)

    if selection is None or not selects_by_row(plan):

        def make() -> tuple[BlockMask, Tensor | None, Tensor | None]:
            found = tile_plan(plan, shape.queries, shape.keys, stationary)
            return found.lists.to(device), _index_of(found.queries, device), _index_of(found.keys, device)

        made = _once(plan, ("tiles", shape.queries, shape.keys, stationary, device), make)
        yield None, kernel_plan(*made, gathered=False)
        return
    keys = _once(plan, ("blocks", shape.keys), lambda: Tiling.of(plan.keys, shape.keys, selection.blocks.of(plan.keys)))
    k_index = _index_of(keys, device)
    max_slots = SLOT_BYTES // (4 * max(q.shape[2], v.shape[2]))
    for rows in gathered_rows(plan, keys, k.shape[1], shape.queries, max_slots, device):
        if len(rows.index):
            lists = rows.of_queries if stationary == "queries" else rows.of_keys
            yield rows, kernel_plan(lists, rows.index, k_index, gathered=True)


def _index_of(tiling: Tiling, device: torch.device) -> Tensor | None:
    """Return the rows of the tiles, int32 `[tiles * size]`; None where rows are in order."""
    return None if tiling.index is None else torch.from_numpy(tiling.index).to(device)


def _terms(plan: Plan, device: torch.device) -> MaskTerms:
    return _once(plan, ("terms", device), lambda: mask_terms(plan, device))


def _combine(rows: GatheredRows, part: Tensor, part_lse: Tensor | None, total: Tensor, lse: Tensor | None) -> None:
    """Merge the slots of some rows into these rows of `total` `[T, Hq, width]`, and of `lse` if there is one."""
    width = total.shape[2]
    count, block = (rows.rows.stop - rows.rows.start) * total.shape[1], COMBINED_VALUES // padded(width)
    _launch(
        kernels.combine_kernel, triton.cdiv(count, block), part, part_lse, total[rows.rows],
        None if lse is None else lse[rows.rows], rows.slot_offsets, rows.slots, count,
        WIDTH=width, PADDED=padded(width), BLOCK=block,
    )  # fmt: skip


def _once(plan: Plan, key: tuple[Any, ...], make: Any) -> Any:
    """Return what `make` returns, made once for a plan."""
    if key not in plan.cache:
        plan.cache[key] = make()
    return plan.cache[key]
