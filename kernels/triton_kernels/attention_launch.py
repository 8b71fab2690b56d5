# pyright: reportMissingImports=false
"""Launches of the attention kernels: arguments of a plan on a device, and the order in which the kernels run.

For all plans but those that select blocks by single rows (gathered_launch.py): tiles of consecutive queries visit tiles
of keys. No two programs add to the same row: results have the same bits each time.

Legend: T queries, S keys, Hq query heads, Hk KV heads, D head size, Dv value head size.
"""

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
from farspan.kernels.triton_kernels.tile import KernelPlan, Operand

LOG2E = 1.4426950408889634
MAX_REGISTERS = 255
"""The most that a thread can have. Without this bound ptxas would rather spill a few than run one block less."""
DELTA_ROWS = 64


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

    @property
    def key_sums(self) -> list[dict[str, bool]]:
        """The sums that each launch of dkv makes."""
        both = {"FOR_K": True, "FOR_V": True}
        return [{**both, "FOR_V": False}, {**both, "FOR_K": False}] if self.dkv_in_turn else [both]


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
    tiled = _schedule(q, k, plan, shape, "queries")
    launch(
        kernels.forward_kernel, tiled.num_tiles * q.shape[1], *(Operand.of(x) for x in (q, k, v)), out, lse, tiled,
        scale * LOG2E, **options(shape),
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`, float32; out and lse may be over more keys."""
    plan, shapes, scale = _with_lists(plan), shapes_for(q.shape[2], v.shape[2], q.dtype), q.shape[2] ** -0.5
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
    base, delta = statistics(dout, out, lse, _terms(plan, q.device))
    # Both operands of a product have one dtype.
    given = *(Operand.of(x) for x in (q, k, v, dout.to(q.dtype))), base, delta
    tiled = _schedule(q, k, plan, shapes.dkv, "keys")
    for sums in shapes.key_sums:
        launch(
            kernels.dkv_kernel, tiled.num_tiles * k.shape[1], *given, dk, dv, tiled, scale * LOG2E, scale,
            **options(shapes.dkv), **sums,
        )  # fmt: skip
    tiled = _schedule(q, k, plan, shapes.dq, "queries")
    programs = tiled.num_tiles * q.shape[1]
    launch(kernels.dq_kernel, programs, *given, dq, tiled, scale * LOG2E, scale, **options(shapes.dq))
    return dq, dk, dv


def _with_lists(plan: Plan) -> Plan:
    """Return a plan whose selection, if any, is lists on the CPU; waits for the device."""
    selection = plan.selection
    if not isinstance(selection, PackedSelection):
        return plan
    return _once(plan, ("with lists",), lambda: plan.with_selection(selection.as_lists))


def options(shape: Shape) -> dict[str, int]:
    """Return the tiles of the attention kernels, their warps and stages."""
    return {
        "BLOCK_Q": shape.queries,
        "BLOCK_K": shape.keys,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        "maxnreg": MAX_REGISTERS,
    }


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start the programs of a kernel, if any."""
    if programs:
        kernel[(programs,)](*arguments, **options)


def statistics(dout: Tensor, out: Tensor, lse: Tensor, terms: MaskTerms) -> tuple[Tensor, Tensor]:
    """Return base and delta, float32 `[Hq, T]`; see `delta_kernel`."""
    queries, heads, _ = dout.shape
    base, delta = (torch.empty(heads, queries, dtype=torch.float32, device=dout.device) for _ in range(2))
    launch(
        kernels.delta_kernel, triton.cdiv(queries, DELTA_ROWS) * heads, Operand.of(dout), Operand.of(out),
        lse.contiguous(), delta, base, terms.q_document, queries, HEADS=heads, BLOCK=DELTA_ROWS,
    )  # fmt: skip
    return base, delta


def _schedule(q: Tensor, k: Tensor, plan: Plan, shape: Shape, stationary: Literal["queries", "keys"]) -> KernelPlan:
    """Return the plan by lists of its stationary tiles, which are made once for a plan."""
    device = q.device

    def make() -> tuple[BlockMask, Tensor | None, Tensor | None]:
        found = tile_plan(plan, shape.queries, shape.keys, stationary)
        return found.lists.to(device), _index_of(found.queries, device), _index_of(found.keys, device)

    lists, q_index, k_index = _once(plan, ("tiles", shape.queries, shape.keys, stationary, device), make)
    constants = (tl.constexpr(value) for value in (q.shape[1], k.shape[1]))
    terms = _terms(plan, device)
    return KernelPlan(q_index, k_index, terms, lists, len(q), len(k), len(lists.order), *constants)


def _index_of(tiling: Tiling, device: torch.device) -> Tensor | None:
    """Return the rows of the tiles, int32 `[tiles * size]`; None where rows are in order."""
    return None if tiling.index is None else torch.from_numpy(tiling.index).to(device)


def _terms(plan: Plan, device: torch.device) -> MaskTerms:
    return _once(plan, ("terms", device), lambda: mask_terms(plan, device))


def _once(plan: Plan, key: tuple[Any, ...], make: Any) -> Any:
    """Return what `make` returns, made once for a plan."""
    if key not in plan.cache:
        plan.cache[key] = make()
    return plan.cache[key]
