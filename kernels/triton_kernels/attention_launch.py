# pyright: reportMissingImports=false
"""Launches of the attention kernels: arguments of a plan on a device, and the order in which the kernels run.

For all plans but those that select blocks by single rows (gathered_launch.py): tiles of consecutive queries visit tiles
of keys. No two programs add to the same row: results have the same bits each time.

Legend: T queries, S keys, Hq query heads, Hk KV heads, D head size, Dv value head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.lifetimes.gradient import SUMS
from farspan.kernels.lifetimes.lifetimes import LOCAL, DocumentOrder, Lifetimes
from farspan.kernels.masks.attention_mask import MAX_WINDOW
from farspan.kernels.merge import empty_partial
from farspan.kernels.planner import InputSpec
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import attention as kernels
from farspan.kernels.triton_kernels import type_sums
from farspan.kernels.triton_kernels.mask_terms import MaskTerms, mask_terms
from farspan.kernels.triton_kernels.tile import KernelPlan, Operand
from farspan.kernels.triton_kernels.tile_lists import Tiles, blocks_of

LOG2E = 1.4426950408889634
MAX_REGISTERS = 255
"""The most that a thread can have. Without this bound ptxas would rather spill a few than run one block less."""
DELTA_ROWS = 64
PLACES = 1024
"""Tokens that a step of the type gradient takes together."""


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
    return shapes_in(_HALF, width, value_width, dtype)


def shapes_in(half: dict[tuple[int, int], Shapes], width: int, value_width: int, dtype: torch.dtype) -> Shapes:
    """Return the same, of a table for dtypes of 16 bits."""
    table = _FLOAT32 if dtype == torch.float32 else half
    return next(shapes for limits, shapes in table.items() if width <= limits[0] and value_width <= limits[1])


def prepare(plan: Plan, spec: InputSpec) -> None:
    """Make what both passes of a plan find on the device, whatever its selection or lifetimes."""
    shapes = shapes_for(spec.head_dim, spec.value_dim, spec.dtype)
    _terms(plan, spec.device)
    for shape in (shapes.forward, shapes.dq):
        Tiles.of(plan, shape.queries, shape.keys, "queries", spec.device).prepare(plan)
    Tiles.of(plan, shapes.dkv.queries, shapes.dkv.keys, "keys", spec.device).prepare(plan)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return out `[T, Hq, Dv]` and lse `[T, Hq]`, float32, of q `[T, Hq, D]`, k `[S, Hk, D]`, v `[S, Hk, Dv]`."""
    shape, scale = shapes_for(q.shape[2], v.shape[2], q.dtype).forward, q.shape[2] ** -0.5
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    given = [Operand.of(x) for x in (q, k, v)]
    for tiled in _schedule(q, k, plan, shape, "queries"):
        programs = tiled.num_launched * q.shape[1]
        launch(kernels.forward_kernel, programs, *given, out, lse, tiled, scale * LOG2E, **options(shape))
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`, float32; out and lse may be over more keys."""
    shapes, scale = shapes_for(q.shape[2], v.shape[2], q.dtype), q.shape[2] ** -0.5
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
    base, delta = statistics(dout, out, lse, _terms(plan, q.device))
    # Both operands of a product have one dtype.
    given = *(Operand.of(x) for x in (q, k, v, dout.to(q.dtype))), base, delta
    for tiled in _schedule(q, k, plan, shapes.dkv, "keys"):
        for sums in shapes.key_sums:
            launch(
                kernels.dkv_kernel, tiled.num_launched * k.shape[1], *given, dk, dv, tiled, scale * LOG2E, scale,
                **options(shapes.dkv), **sums,
            )  # fmt: skip
    for tiled in _schedule(q, k, plan, shapes.dq, "queries"):
        programs = tiled.num_launched * q.shape[1]
        launch(kernels.dq_kernel, programs, *given, dq, tiled, scale * LOG2E, scale, **options(shapes.dq))
    return dq, dk, dv


def pair_sums(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal_lse: Tensor, *, plan: Plan, lifetimes: Lifetimes
) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.lifetimes.gradient.pair_sums`; the sums are float32."""
    shapes, scale = shapes_for(q.shape[2], v.shape[2], q.dtype), q.shape[2] ** -0.5
    base, delta = statistics(dout, out, causal_lse, _terms(plan, q.device))
    given = *(Operand.of(x) for x in (q, k, v, dout.to(q.dtype))), base, delta
    of_queries, of_keys = (torch.zeros(len(x), k.shape[1], SUMS, dtype=torch.float32, device=q.device) for x in (q, k))
    ends, window = (lifetimes.following.contiguous(), lifetimes.beyond.contiguous()), min(lifetimes.window, MAX_WINDOW)
    for tiled in _schedule(q, k, plan, shapes.dkv, "keys"):
        launch(
            type_sums.key_sums_kernel, tiled.num_launched * k.shape[1], *given, of_keys, *ends, window, tiled,
            scale * LOG2E, **options(shapes.dkv),
        )  # fmt: skip
    # Where only local keys live, and up to the next global token, queries find the few tiles that they sum over.
    locals_only = plan.with_lifetimes(lifetimes.following.masked_fill(lifetimes.types != LOCAL, -1))
    for tiled in _schedule(q, k, locals_only, shapes.dq, "queries"):
        launch(
            type_sums.query_sums_kernel, tiled.num_launched * k.shape[1], *given, of_queries, tiled, scale * LOG2E,
            **options(shapes.dq),
        )  # fmt: skip
    return of_queries, of_keys


def type_gradient(sums: Tensor, lifetimes: Lifetimes, order: DocumentOrder) -> Tensor:
    """See `farspan.kernels.lifetimes.gradient.type_gradient`."""
    tokens, kv_heads, _ = sums.shape
    gradient = torch.empty(tokens, kv_heads, 3, dtype=torch.float64, device=sums.device)
    launch(
        type_sums.type_gradient_kernel, kv_heads if tokens else 0, sums.contiguous(), lifetimes.types.contiguous(),
        order.to(sums.device).index, gradient, tokens, KV_HEADS=kv_heads, BLOCK=PLACES,
    )  # fmt: skip
    return gradient


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


def _schedule(
    q: Tensor, k: Tensor, plan: Plan, shape: Shape, stationary: Literal["queries", "keys"]
) -> Iterator[KernelPlan]:
    """Yield the plan by lists of its stationary tiles, of all or some of them at a time.

    What depends on rows and mask alone is made once for a sequence. Lists by content are made anew in each pass: every
    layer has such a plan, which would keep 4 bytes for each visit.
    """
    tiles, terms = Tiles.of(plan, shape.queries, shape.keys, stationary, q.device), _terms(plan, q.device)
    for lists in tiles.block_masks(plan):
        yield KernelPlan(
            tiles.q_index, tiles.k_index, terms, lists, len(q), len(k), tiles.count, len(lists.order),
            tl.constexpr(q.shape[1]), tl.constexpr(k.shape[1]),
        )  # fmt: skip


def _terms(plan: Plan, device: torch.device) -> MaskTerms:
    """Return the mask of a plan; all but the lifetimes are made once for a sequence."""
    terms = once(plan.shared, ("terms", device, *blocks_of(plan)), lambda: mask_terms(plan, device))
    return terms if plan.lifetime is None else terms._replace(lifetime=plan.lifetime.contiguous())
