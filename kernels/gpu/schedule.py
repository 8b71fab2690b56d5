# pyright: reportMissingImports=false
"""Launches of the attention kernels: what a plan becomes on a device, and in which order the kernels run.

Two schedules. Tiles of consecutive queries visit tiles of keys: all plans but those whose selection is by single rows.
There, rows of any heads that chose a block are gathered into tiles that visit it; each leaves a partial result in a slot
of its own, and slots are merged in a fixed order. Either way no two programs add to the same place: results have the same
bits each time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import triton
from torch import Tensor

from farspan.kernels.gathered_lists import Portion, portions
from farspan.kernels.gpu import kernels
from farspan.kernels.gpu.arguments import Lists, Operand, Terms
from farspan.kernels.gpu.shapes import Shape, Shapes
from farspan.kernels.intervals import Ranking
from farspan.kernels.merge import empty_partial
from farspan.kernels.packing import pack
from farspan.kernels.plan import Plan
from farspan.kernels.tile_lists import TileLists, real_rows, tile_plan
from farspan.kernels.tiling import Tiling

SHARED_ROWS = 16
"""Rows that choose together, on average, from which on they make tiles of their own."""
SLOT_BYTES = 1 << 29
"""Partial results that are held at the same time, where rows choose one by one."""
LOG2E = 1.4426950408889634
ROWS_OF_DELTA = 16
ROWS_OF_COMBINE = 16


def is_gathered(plan: Plan) -> bool:
    """Whether rows choose one by one, or in units too small to make a tile of."""
    selection = plan.selection
    return selection is not None and int((selection.unit >= 0).sum()) < SHARED_ROWS * selection.num_units


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """Attention of some tensors by a plan; q `[T, Hq, D]`, k `[S, Hk, D]`, v `[S, Hk, Dv]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    shapes: Shapes

    @property
    def constants(self) -> dict[str, Any]:
        """What all attention kernels know at compile time."""
        width, value_width = self.q.shape[2], self.v.shape[2]
        return {
            "HEADS": self.q.shape[1],
            "KV_HEADS": self.k.shape[1],
            "HEAD_DIM": width,
            "VALUE_DIM": value_width,
            "PADDED_DIM": padded(width),
            "PADDED_VALUE": padded(value_width),
        }

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        return Operand.of(self.q), Operand.of(self.k), Operand.of(self.v)

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def terms(self) -> Terms:
        """Return the plan's visibility as columns on the device; made once for a plan."""
        return _once(self.plan, ("terms", self.q.device), partial(_terms, self.plan, self.q.device))

    def tiles(
        self, shape: Shape, staying: Literal["queries", "keys"]
    ) -> tuple[Lists, Tensor | None, Tensor | None, int]:
        """Return lists, the rows of query and key tiles unless they are in order, and the tiles with lists."""
        device = self.q.device

        def make() -> tuple[Lists, Tensor | None, Tensor | None, int]:
            found = tile_plan(self.plan, shape.queries, shape.keys, staying)
            lists = found.lists
            return columns(lists, device), index_of(found.queries, device), index_of(found.keys, device), lists.tiles

        return _once(self.plan, ("tiles", shape.queries, shape.keys, staying, device), make)


def padded(width: int) -> int:
    """Return the width of a tile: a power of two that tensor cores take."""
    return max(triton.next_power_of_2(width), 16)


def columns(lists: TileLists, device: torch.device) -> Lists:
    """Return lists as an argument of kernels."""
    lists = lists.to(device)
    return Lists(lists.offsets, lists.visits, lists.entries, lists.order, lists.group)


def index_of(tiling: Tiling, device: torch.device) -> Tensor | None:
    """Return the row at each place of the tiles, int32; None where rows are in order."""
    return None if tiling.index is None else torch.from_numpy(tiling.index).to(device)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out `[T, Hq, Dv]` and lse `[T, Hq]`, float32."""
    q, v = problem.q, problem.v
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    if is_gathered(problem.plan):
        _gathered_forward(problem, out, lse)
        return out, lse
    lists, q_index, k_index, tiles = problem.tiles(problem.shapes.forward, "queries")
    _forward(problem, out, lse, lists, q_index, k_index, tiles, gathered=False)
    return out, lse


def backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`, float32; out and lse may be over more keys."""
    q, k, v = problem.q, problem.k, problem.v
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
    base, delta = _delta(problem, dout, out, lse)
    # Operands of a product have one dtype.
    given = Operand.of(dout.to(q.dtype)), base, delta
    if is_gathered(problem.plan):
        _gathered_backward(problem, given, dq, dk, dv)
        return dq, dk, dv
    lists, q_index, k_index, tiles = problem.tiles(problem.shapes.dkv, "keys")
    _dkv(problem, given, dk, dv, lists, q_index, k_index, tiles, gathered=False)
    lists, q_index, k_index, tiles = problem.tiles(problem.shapes.dq, "queries")
    _dq(problem, given, dq, lists, q_index, k_index, tiles, gathered=False)
    return dq, dk, dv


def _forward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    q_index: Tensor | None,
    k_index: Tensor | None,
    tiles: int,
    *,
    gathered: bool,
) -> None:
    shape = problem.shapes.forward
    kernels.forward_kernel[_grid(problem, tiles, gathered)](
        *problem.operands, out, lse, q_index, k_index, problem.terms(), lists,
        len(problem.q), len(problem.k), tiles, problem.scale * LOG2E,
        **problem.constants, BLOCK_Q=shape.queries, BLOCK_K=shape.keys, GATHERED=gathered,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


Given = tuple[Operand, Tensor, Tensor]
"""dout, base and delta."""


def _dq(
    problem: Problem,
    given: Given,
    dq: Tensor,
    lists: Lists,
    q_index: Tensor | None,
    k_index: Tensor | None,
    tiles: int,
    *,
    gathered: bool,
) -> None:
    shape = problem.shapes.dq
    kernels.dq_kernel[_grid(problem, tiles, gathered)](
        *problem.operands, *given, dq, q_index, k_index, problem.terms(), lists,
        len(problem.q), len(problem.k), tiles, problem.scale * LOG2E, problem.scale,
        **problem.constants, BLOCK_Q=shape.queries, BLOCK_K=shape.keys, GATHERED=gathered,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def _dkv(
    problem: Problem,
    given: Given,
    dk: Tensor,
    dv: Tensor,
    lists: Lists,
    q_index: Tensor | None,
    k_index: Tensor | None,
    tiles: int,
    *,
    gathered: bool,
) -> None:
    shape = problem.shapes.dkv
    if tiles:
        kernels.dkv_kernel[(tiles * problem.k.shape[1],)](
            *problem.operands, *given, dk, dv, q_index, k_index, problem.terms(), lists,
            len(problem.q), len(problem.k), tiles, problem.scale * LOG2E, problem.scale,
            **problem.constants, BLOCK_Q=shape.queries, BLOCK_K=shape.keys, GATHERED=gathered,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip


def _grid(problem: Problem, tiles: int, gathered: bool) -> tuple[int]:
    return (tiles if gathered else tiles * problem.q.shape[1],)


def _delta(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return base and delta, float32 `[Hq, T]`; see `delta_kernel`."""
    queries, heads, width = dout.shape
    base, delta = (torch.empty(heads, queries, dtype=torch.float32, device=dout.device) for _ in range(2))
    if queries:
        kernels.delta_kernel[(triton.cdiv(queries, ROWS_OF_DELTA), heads)](
            Operand.of(dout), Operand.of(out), lse.contiguous(), delta, base, problem.terms().q_document, queries,
            HEADS=heads, VALUE_DIM=width, PADDED_VALUE=padded(width), BLOCK=ROWS_OF_DELTA,
        )  # fmt: skip
    return base, delta


def _gathered_forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    shape = problem.shapes.forward
    keys = _blocks_of_keys(problem, shape)
    for portion in _portions(problem, keys, shape):
        slots = len(portion.index)
        part = out.new_empty(slots, out.shape[2])
        part_lse = lse.new_empty(slots)
        lists = columns(portion.of_queries, out.device)
        tiles = portion.of_queries.tiles
        k_index = index_of(keys, out.device)
        _forward(problem, part, part_lse, lists, portion.index, k_index, tiles, gathered=True)
        _combine(portion, part, part_lse, out, lse)


def _gathered_backward(problem: Problem, given: Given, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    for shape, wants_dq in ((problem.shapes.dkv, False), (problem.shapes.dq, True)):
        keys = _blocks_of_keys(problem, shape)
        k_index = index_of(keys, dq.device)
        for portion in _portions(problem, keys, shape):
            if wants_dq:
                part = dq.new_empty(len(portion.index), dq.shape[2])
                lists, tiles = columns(portion.of_queries, dq.device), portion.of_queries.tiles
                _dq(problem, given, part, lists, portion.index, k_index, tiles, gathered=True)
                _combine(portion, part, None, dq, None)
            else:
                lists, tiles = columns(portion.of_keys, dq.device), portion.of_keys.tiles
                _dkv(problem, given, dk, dv, lists, portion.index, k_index, tiles, gathered=True)


def _blocks_of_keys(problem: Problem, shape: Shape) -> Tiling:
    """Return the plan's keys cut by the blocks of its selection; made once for a plan."""
    selection = problem.plan.selection
    assert selection is not None
    rows = problem.plan.keys
    return _once(problem.plan, ("blocks", shape.keys), lambda: Tiling.of(rows, shape.keys, selection.blocks.of(rows)))


def _portions(problem: Problem, keys: Tiling, shape: Shape) -> Any:
    """Yield the portions of a plan. They are not kept: each plan of a layer would hold 8 bytes per choice."""
    widest = max(problem.q.shape[2], problem.v.shape[2])
    max_slots = SLOT_BYTES // (4 * widest)
    for portion in portions(problem.plan, keys, problem.k.shape[1], shape.queries, max_slots, problem.q.device):
        if len(portion.index):
            yield portion


def _combine(portion: Portion, part: Tensor, part_lse: Tensor | None, total: Tensor, lse: Tensor | None) -> None:
    """Merge the slots of a portion into its rows of `total` `[T, Hq, width]`, and of `lse` if there is one."""
    rows, width = portion.rows, total.shape[2]
    count = (rows.stop - rows.start) * total.shape[1]
    kernels.combine_kernel[(triton.cdiv(count, ROWS_OF_COMBINE),)](
        part, part_lse, total[rows], None if lse is None else lse[rows], portion.slot_offsets, portion.slots, count,
        WIDTH=width, PADDED=padded(width), BLOCK=ROWS_OF_COMBINE,
    )  # fmt: skip


def _terms(plan: Plan, device: torch.device) -> Terms:
    """Return what `visible` of the kernels compares."""
    visibility = plan.visibility
    queries, keys = real_rows(plan)
    ranking = Ranking.of(keys)
    near = np.stack([ranking.near(queries, part.visibility) for part in plan.parts], axis=1)
    window = np.zeros(plan.heads, dtype=np.int32)
    for number, part in enumerate(plan.parts):
        window[list(part.heads)] = number
    columns: dict[str, Any] = {
        "q_document": queries.document, "k_rank": ranking.rank, "window": window, "q_first": near[0], "q_last": near[1]
    }  # fmt: skip
    if visibility.sinks:
        columns["q_first_sink"], columns["q_last_sink"] = ranking.sinks(queries, visibility)
    if plan.lifetime is not None:
        columns["q_position"], columns["lifetime"] = queries.position, plan.lifetime
    if visibility.neighbourhood is not None:
        columns |= pack(visibility.neighbourhood, queries, keys)
    found = {
        name: column if isinstance(column, int) else torch.as_tensor(column).to(device, torch.int32).contiguous()
        for name, column in columns.items()
    }
    return Terms(**{name: found.get(name) for name in Terms._fields})  # pyright: ignore[reportArgumentType]


def _once(plan: Plan, key: tuple[Any, ...], make: Any) -> Any:
    """Return what `make` returns, made once for a plan."""
    if key not in plan.derived:
        plan.derived[key] = make()
    return plan.derived[key]
