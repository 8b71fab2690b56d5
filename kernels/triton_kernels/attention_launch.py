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
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from farspan.kernels.merge import empty_partial
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.tiles import Tiling
from farspan.kernels.triton_kernels import attention as kernels
from farspan.kernels.triton_kernels.arguments import MaskTerms, Operand
from farspan.kernels.triton_kernels.block_mask import BlockMask, active_rows, tile_plan
from farspan.kernels.triton_kernels.key_ranks import KeyRanks
from farspan.kernels.triton_kernels.packed_coordinates import pack
from farspan.kernels.triton_kernels.row_block_lists import GatheredRows, gathered_rows, selects_by_row
from farspan.kernels.triton_kernels.shapes import Shape, Shapes

SLOT_BYTES = 1 << 29
"""Partial results that exist at the same time, where single rows select blocks."""
LOG2E = 1.4426950408889634
MAX_REGISTERS = 255
"""The most that a thread can have. Without this bound ptxas would rather spill a few than run one block less."""
DELTA_ROWS = 64
COMBINED_VALUES = 4096
"""32 for each thread of a program: at 64 rows of 256, registers spill."""


class Tiles(NamedTuple):
    """Lists of the stationary tiles, how many these are, and the rows in query and key tiles, None if in order."""

    lists: BlockMask
    q_index: Tensor | None
    k_index: Tensor | None
    num_tiles: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """Attention of some tensors by a plan; q `[T, Hq, D]`, k `[S, Hk, D]`, v `[S, Hk, Dv]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    shapes: Shapes

    def constants(self, shape: Shape) -> dict[str, Any]:
        """Return the compile-time arguments of the attention kernels, and their warps and stages."""
        width, value_width = self.q.shape[2], self.v.shape[2]
        return {
            "HEADS": self.q.shape[1],
            "KV_HEADS": self.k.shape[1],
            "HEAD_DIM": width,
            "VALUE_DIM": value_width,
            "PADDED_DIM": padded(width),
            "PADDED_VALUE": padded(value_width),
            "BLOCK_Q": shape.queries,
            "BLOCK_K": shape.keys,
            "num_warps": shape.warps,
            "num_stages": shape.stages,
            "maxnreg": MAX_REGISTERS,
        }

    def shared(self, tiles: Tiles) -> tuple[Any, ...]:
        """Return the arguments that all attention kernels take after their operands and results."""
        return (
            tiles.q_index, tiles.k_index, self.terms(), tiles.lists,
            len(self.q), len(self.k), tiles.num_tiles, self.scale * LOG2E,
        )  # fmt: skip

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        return Operand.of(self.q), Operand.of(self.k), Operand.of(self.v)

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def terms(self) -> MaskTerms:
        """Return the plan's mask as columns on the device; made once for a plan."""
        return _once(self.plan, ("terms", self.q.device), partial(_terms, self.plan, self.q.device))

    def tiles(self, shape: Shape, stationary: Literal["queries", "keys"]) -> Tiles:
        """Return tiles of so many rows and their lists; made once for a plan."""
        device = self.q.device

        def make() -> Tiles:
            found = tile_plan(self.plan, shape.queries, shape.keys, stationary)
            q_index, k_index = index_of(found.queries, device), index_of(found.keys, device)
            return Tiles(found.lists.to(device), q_index, k_index, found.lists.num_tiles)

        return _once(self.plan, ("tiles", shape.queries, shape.keys, stationary, device), make)


def padded(width: int) -> int:
    """Return the width of a tile: a power of two that tensor cores take, at least 16."""
    return max(triton.next_power_of_2(width), 16)


def index_of(tiling: Tiling, device: torch.device) -> Tensor | None:
    """Return the rows of the tiles, int32 `[tiles * size]`; None where rows are in order."""
    return None if tiling.index is None else torch.from_numpy(tiling.index).to(device)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out `[T, Hq, Dv]` and lse `[T, Hq]`, float32."""
    q, v = problem.q, problem.v
    out, lse = empty_partial(q.shape[0], q.shape[1], v.shape[2], like=q)
    if selects_by_row(problem.plan):
        _gathered_forward(problem, out, lse)
        return out, lse
    _forward(problem, out, lse, problem.tiles(problem.shapes.forward, "queries"), gathered=False)
    return out, lse


def backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq `[T, Hq, D]`, dk `[S, Hk, D]`, dv `[S, Hk, Dv]`, float32; out and lse may be over more keys."""
    q, k, v = problem.q, problem.k, problem.v
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
    base, delta = _delta(problem, dout, out, lse)
    # Both operands of a product have one dtype.
    statistics = Operand.of(dout.to(q.dtype)), base, delta
    if selects_by_row(problem.plan):
        _gathered_backward(problem, statistics, dq, dk, dv)
        return dq, dk, dv
    _dkv(problem, statistics, dk, dv, problem.tiles(problem.shapes.dkv, "keys"), gathered=False)
    _dq(problem, statistics, dq, problem.tiles(problem.shapes.dq, "queries"), gathered=False)
    return dq, dk, dv


Statistics = tuple[Operand, Tensor, Tensor]
"""dout `[T, Hq, Dv]`, and base and delta `[Hq, T]` of `delta_kernel`."""


def _forward(problem: Problem, out: Tensor, lse: Tensor, tiles: Tiles, *, gathered: bool) -> None:
    programs = tiles.num_tiles * (1 if gathered else problem.q.shape[1])
    _launch(
        kernels.forward_kernel, programs, *problem.operands, out, lse, *problem.shared(tiles),
        **problem.constants(problem.shapes.forward), GATHERED=gathered,
    )  # fmt: skip


def _dq(problem: Problem, statistics: Statistics, dq: Tensor, tiles: Tiles, *, gathered: bool) -> None:
    programs = tiles.num_tiles * (1 if gathered else problem.q.shape[1])
    _launch(
        kernels.dq_kernel, programs, *problem.operands, *statistics, dq, *problem.shared(tiles), problem.scale,
        **problem.constants(problem.shapes.dq), GATHERED=gathered,
    )  # fmt: skip


def _dkv(problem: Problem, statistics: Statistics, dk: Tensor, dv: Tensor, tiles: Tiles, *, gathered: bool) -> None:
    shapes = problem.shapes
    for for_k, for_v in ((True, False), (False, True)) if shapes.dkv_in_turn else ((True, True),):
        _launch(
            kernels.dkv_kernel, tiles.num_tiles * problem.k.shape[1], *problem.operands, *statistics, dk, dv,
            *problem.shared(tiles), problem.scale,
            **problem.constants(shapes.dkv), GATHERED=gathered, FOR_K=for_k, FOR_V=for_v,
        )  # fmt: skip


def _launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start so many programs of a kernel, if any."""
    if programs:
        kernel[(programs,)](*arguments, **options)


def _delta(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return base and delta, float32 `[Hq, T]`; see `delta_kernel`."""
    queries, heads, width = dout.shape
    base, delta = (torch.empty(heads, queries, dtype=torch.float32, device=dout.device) for _ in range(2))
    _launch(
        kernels.delta_kernel, triton.cdiv(queries, DELTA_ROWS) * heads, Operand.of(dout), Operand.of(out),
        lse.contiguous(), delta, base, problem.terms().q_document, queries,
        HEADS=heads, VALUE_DIM=width, PADDED_VALUE=padded(width), BLOCK=DELTA_ROWS,
    )  # fmt: skip
    return base, delta


def _gathered_forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    for rows, of_queries, _ in _gathered_tiles(problem, problem.shapes.forward):
        # [slots, Dv], [slots]
        part, part_lse = out.new_empty(len(rows.index), out.shape[2]), lse.new_empty(len(rows.index))
        _forward(problem, part, part_lse, of_queries, gathered=True)
        _combine(rows, part, part_lse, out, lse)


def _gathered_backward(problem: Problem, statistics: Statistics, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    for _, _, of_keys in _gathered_tiles(problem, problem.shapes.dkv):
        _dkv(problem, statistics, dk, dv, of_keys, gathered=True)
    for rows, of_queries, _ in _gathered_tiles(problem, problem.shapes.dq):
        # [slots, D]
        part = dq.new_empty(len(rows.index), dq.shape[2])
        _dq(problem, statistics, part, of_queries, gathered=True)
        _combine(rows, part, None, dq, None)


def _gathered_tiles(problem: Problem, shape: Shape) -> Iterator[tuple[GatheredRows, Tiles, Tiles]]:
    """Yield the gathered rows of a plan, some rows at a time, each with its tiles of queries and of keys.

    They are made anew in each pass: every layer has such a plan, which would keep 8 bytes for each selected block.
    """
    plan, device = problem.plan, problem.q.device
    selection = plan.selection
    assert selection is not None
    keys = _once(plan, ("blocks", shape.keys), lambda: Tiling.of(plan.keys, shape.keys, selection.blocks.of(plan.keys)))
    k_index = index_of(keys, device)
    max_slots = SLOT_BYTES // (4 * max(problem.q.shape[2], problem.v.shape[2]))
    for rows in gathered_rows(plan, keys, problem.k.shape[1], shape.queries, max_slots, device):
        if len(rows.index):
            of_queries, of_keys = (
                Tiles(lists.to(device), rows.index, k_index, lists.num_tiles)
                for lists in (rows.of_queries, rows.of_keys)
            )
            yield rows, of_queries, of_keys


def _combine(rows: GatheredRows, part: Tensor, part_lse: Tensor | None, total: Tensor, lse: Tensor | None) -> None:
    """Merge the slots of some rows into these rows of `total` `[T, Hq, width]`, and of `lse` if there is one."""
    width = total.shape[2]
    count, block = (rows.rows.stop - rows.rows.start) * total.shape[1], COMBINED_VALUES // padded(width)
    _launch(
        kernels.combine_kernel, triton.cdiv(count, block), part, part_lse, total[rows.rows],
        None if lse is None else lse[rows.rows], rows.slot_offsets, rows.slots, count,
        WIDTH=width, PADDED=padded(width), BLOCK=block,
    )  # fmt: skip


def _terms(plan: Plan, device: torch.device) -> MaskTerms:
    """Return the columns that `evaluate_mask` compares."""
    attention_mask = plan.attention_mask
    queries, keys = active_rows(plan)
    ranks = KeyRanks.of(keys)
    # [2, windows, T]
    near = np.stack([ranks.near(queries, part.attention_mask) for part in plan.parts], axis=1)
    window = np.zeros(plan.heads, dtype=np.int32)
    for number, part in enumerate(plan.parts):
        window[list(part.heads)] = number
    columns: dict[str, Any] = {
        "q_document": queries.document, "k_rank": ranks.rank, "window": window, "q_first": near[0], "q_last": near[1]
    }  # fmt: skip
    if attention_mask.sinks:
        columns["q_first_sink"], columns["q_last_sink"] = ranks.sinks(queries, attention_mask)
    if plan.lifetime is not None:
        columns["q_position"], columns["lifetime"] = queries.position, plan.lifetime
    if attention_mask.neighborhood is not None:
        columns |= pack(attention_mask.neighborhood, queries, keys)
    found = {
        name: column if isinstance(column, int) else torch.as_tensor(column).to(device, torch.int32).contiguous()
        for name, column in columns.items()
    }
    return MaskTerms(**{name: found.get(name) for name in MaskTerms._fields})  # pyright: ignore[reportArgumentType]


def _once(plan: Plan, key: tuple[Any, ...], make: Any) -> Any:
    """Return what `make` returns, made once for a plan."""
    if key not in plan.cache:
        plan.cache[key] = make()
    return plan.cache[key]
