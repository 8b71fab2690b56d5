# pyright: reportMissingImports=false
"""Products of rows, sorted by expert, with the matrices of their experts: launches of the kernels.

The device alone knows how many rows an expert has. The host starts as many programs as tiles of one expert each could
come to, and those without a tile end at once: nothing waits for the device. No two programs write to the same row:
results have the same bits each time.

Legend: N rows, C width, F inner size, E experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from farspan.kernels.triton_kernels import grouped as kernels


class Tile(NamedTuple):
    """Rows of x, columns of the result and depth of the sum that a program takes at a time; its warps and stages.

    For a gradient of weights: rows summed at a time, and rows and columns of the gradient.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Found by compiling for an H100 (docs/kernels_sm90.md): large tiles whose registers do not spill. No timings yet.
TILES: dict[Any, tuple[Tile, Tile, Tile]] = {
    kernels.product_kernel: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 8, 2), Tile(64, 64, 16, 8, 2)),
    kernels.swiglu_kernel: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 32, 8, 2), Tile(64, 64, 16, 8, 2)),
    kernels.swiglu_backward_kernel: (Tile(128, 64, 64, 8, 3), Tile(64, 64, 32, 8, 2), Tile(64, 32, 16, 8, 1)),
    kernels.weight_kernel: (Tile(64, 128, 128, 8, 3), Tile(32, 64, 64, 8, 2), Tile(16, 64, 64, 8, 2)),
}
"""The tile of each kernel for 16 bits, for 16 bits at odd places, and for float32.

Where rows do not start at multiples of 16 elements, every element is a load of its own, which takes registers. Exact
float32 products run on ordinary cores, from registers: for checks, not for speed.
"""
EVEN = 16
"""Triton compiles for pointers, strides and sizes that are multiples of it, and for others."""


class Rows(NamedTuple):
    """Rows `[N, width]` whose width has stride 1; row i is that at order[i] // shared, where there is an order."""

    pointer: Tensor
    row_stride: int
    order: Tensor | None
    shared: int

    @staticmethod
    def of(x: Tensor, order: Tensor | None = None, shared: int = 1) -> "Rows":
        """Return `x`, or a copy of it if its width has another stride."""
        x = x if x.stride(1) == 1 else x.contiguous()
        return Rows(x, x.stride(0), order, shared)


class Matrices(NamedTuple):
    """A matrix `[depth, columns]` of each expert with any strides."""

    pointer: Tensor
    expert_stride: int
    column_stride: int
    depth_stride: int

    @staticmethod
    def of(matrices: Tensor) -> "Matrices":
        return Matrices(matrices, matrices.stride(0), matrices.stride(2), matrices.stride(1))


class ExpertRows(NamedTuple):
    """counts: rows of each expert, int64 `[E]`; those of expert `only`, or of all if that is -1, are worked on."""

    counts: Tensor
    number: int
    only: int

    @staticmethod
    def of(counts: Tensor, only: int = -1) -> "ExpertRows":
        return ExpertRows(counts, len(counts), only)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """See `farspan.kernels.moe.grouped_loop.swiglu`; float32, bfloat16 or float16."""
    # [N, C], [N, F]
    out, inner, experts = x.new_zeros(x.shape), x.new_empty(len(x), gate.shape[1]), ExpertRows.of(counts)
    _by_rows(
        kernels.swiglu_kernel, experts, len(x), inner.shape[1], x.shape[1],
        Rows.of(inner), Rows.of(x), Matrices.of(gate.mT), Matrices.of(up.mT),
    )  # fmt: skip
    product(Rows.of(out), experts, len(x), (Rows.of(inner), down.mT))
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `farspan.kernels.moe.grouped_loop.swiglu_backward`."""
    dx, (dgate, dup, ddown) = x.new_zeros(x.shape), (torch.empty_like(weight) for weight in (gate, up, down))
    # [N, F]: silu(x gate) * (x up), and the gradients of x gate and of x up.
    inner, dgated, draised = (x.new_empty(len(x), gate.shape[1]) for _ in range(3))
    experts = ExpertRows.of(counts)
    _by_rows(
        kernels.swiglu_backward_kernel, experts, len(x), inner.shape[1], x.shape[1],
        *(Rows.of(rows) for rows in (inner, dgated, draised, x, dout)),
        *(Matrices.of(matrices) for matrices in (gate.mT, up.mT, down)),
    )  # fmt: skip
    product(Rows.of(dx), experts, len(x), (Rows.of(dgated), gate), (Rows.of(draised), up))
    of_weights = ((ddown, dout, inner), (dgate, dgated, x), (dup, draised, x))
    longest_first = counts.argsort(descending=True, stable=True)
    for dweight, of_out, of_in in of_weights:
        weight_gradient(dweight, experts, longest_first, Rows.of(of_out), Rows.of(of_in))
    return dx, dgate, dup, ddown


def product(
    out: Rows, experts: ExpertRows, rows: int, first: tuple[Rows, Tensor], second: tuple[Rows, Tensor] | None = None,
    *, add: bool = False,
) -> None:  # fmt: skip
    """Set rows of `out` `[N, columns]` to the product of rows `[N, depth]` and matrices `[E, depth, columns]`.

    Or to the sum of two such products; or add to these rows. rows: the most that the experts have in all.
    """
    x, matrices = first
    more = (None, None) if second is None else (second[0], Matrices.of(second[1]))
    operands = out, x, Matrices.of(matrices), *more
    _by_rows(kernels.product_kernel, experts, rows, matrices.shape[2], matrices.shape[1], *operands, ADD=add)


def weight_gradient(dweight: Tensor, experts: ExpertRows, longest_first: Tensor, dout: Rows, x: Rows) -> None:
    """Set dweight `[E, out, in]`, of any strides, to dout_e^T x_e of rows `[N, out]` and `[N, in]`."""
    width, depth = dweight.shape[1:]
    operands = Matrices.of(dweight.mT), dout, x
    tile = tile_for(kernels.weight_kernel, operands, width, depth)
    programs = len(dweight) * triton.cdiv(width, tile.columns) * triton.cdiv(depth, tile.depth)
    _launch(kernels.weight_kernel, programs, tile, experts, *operands, experts, longest_first, width, depth)


def tile_for(kernel: Any, operands: Iterable[Rows | Matrices | None], width: int, depth: int) -> Tile:
    """Return the tile of a kernel for operands, by the dtype of the last and by how they can be loaded."""
    even_half, odd_half, full = TILES[kernel]
    present = [part for part in operands if part is not None]
    if present[-1].pointer.dtype == torch.float32:
        return full
    even = all(part.pointer.data_ptr() % EVEN == 0 for part in present)
    strides = (part[1:2] if isinstance(part, Rows) else part[1:] for part in present)
    numbers = {width, depth, *(stride for of_part in strides for stride in of_part)} - {1}
    return even_half if even and not any(number % EVEN for number in numbers) else odd_half


def _by_rows(
    kernel: Any, experts: ExpertRows, rows: int, width: int, depth: int, *operands: Rows | Matrices | None,
    **options: Any,
) -> None:  # fmt: skip
    """Launch a kernel for each tile of rows and block of columns of its result `[N, width]`, its first operand."""
    tile = tile_for(kernel, operands, width, depth)
    # Each expert has at most one tile that is not full, of one row at least.
    partial = min(experts.number if experts.only < 0 else 1, rows)
    tiles = (rows + partial * (tile.rows - 1)) // tile.rows
    programs = tiles * triton.cdiv(width, tile.columns)
    _launch(kernel, programs, tile, experts, *operands, experts, width, depth, **options)


def _launch(kernel: Any, programs: int, tile: Tile, experts: ExpertRows, *arguments: Any, **options: Any) -> None:
    """Start the programs of a kernel, if any, on the device of its result."""
    if programs:
        with torch.cuda.device_of(arguments[0].pointer):
            kernel[(programs,)](
                *arguments, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
                EXPERTS=max(triton.next_power_of_2(experts.number), 16),
                num_warps=tile.warps, num_stages=tile.stages, **options,
            )  # fmt: skip
