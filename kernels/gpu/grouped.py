# pyright: reportMissingImports=false
"""Products of rows, sorted by expert, with matrices of their expert: launches of the kernels.

The host knows how many rows an expert has, so it cuts them into tiles of one expert each: nothing waits for the device,
and an expert without rows costs nothing but the zeros of its gradients. No two programs write to the same place:
results have the same bits each time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from farspan.kernels.gpu import grouped_kernels as kernels


class Tile(NamedTuple):
    """Rows of x, columns of the result and depth of the sum that a program takes at a time; its warps and stages.

    Of a gradient of weights: rows summed at a time, and rows and columns of the gradient.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """Of each kernel."""

    product: Tile
    swiglu: Tile
    swiglu_backward: Tile
    weight: Tile


# Found by compiling for an H100 (docs/kernels_sm90.md): large tiles whose registers do not spill. No timings yet.
HALF = Tiles(
    product=Tile(128, 128, 64, 8, 3),
    swiglu=Tile(128, 128, 64, 8, 3),
    swiglu_backward=Tile(128, 64, 64, 8, 3),
    weight=Tile(64, 128, 128, 8, 3),
)
# Where rows do not begin at multiples of 16 numbers, each number is loaded by itself, and takes registers on its way.
ODD_HALF = Tiles(
    product=Tile(64, 64, 32, 8, 2),
    swiglu=Tile(64, 64, 32, 8, 2),
    swiglu_backward=Tile(64, 64, 32, 8, 2),
    weight=Tile(32, 64, 64, 8, 2),
)
# Exact float32 products run on ordinary cores, from registers: for checks, not for speed.
FLOAT32 = Tiles(
    product=Tile(64, 64, 16, 8, 2),
    swiglu=Tile(64, 64, 16, 8, 2),
    swiglu_backward=Tile(64, 32, 16, 8, 2),
    weight=Tile(16, 64, 64, 8, 2),
)
EVEN = 16
"""Triton knows of pointers, strides and sizes whether they are multiples of it."""


class Rows(NamedTuple):
    """Rows `[N, width]` whose width has stride 1."""

    pointer: Tensor
    row: int

    @staticmethod
    def of(x: Tensor) -> "Rows":
        """Return `x`, or a copy of it if its width has another stride."""
        x = x if x.stride(1) == 1 else x.contiguous()
        return Rows(x, x.stride(0))


class Matrices(NamedTuple):
    """A matrix of each expert with any strides: from `depth` numbers to `column` numbers."""

    pointer: Tensor
    expert: int
    column: int
    depth: int

    @staticmethod
    def of(weight: Tensor) -> "Matrices":
        """Return those of x weight^T, weight `[E, column, depth]`."""
        return Matrices(weight, *weight.stride())

    @staticmethod
    def back(weight: Tensor) -> "Matrices":
        """Return those of dout weight, weight `[E, depth, column]`."""
        return Matrices(weight, weight.stride(0), weight.stride(2), weight.stride(1))


def linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """See `farspan.kernels.grouped_loop.linear`; float32, bfloat16 or float16."""
    out = x.new_empty(len(x), weight.shape[1])
    product(out, counts, (x, Matrices.of(weight)))
    return out


def linear_backward(x: Tensor, weight: Tensor, counts: Sequence[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.grouped_loop.linear_backward`."""
    dx, dweight = x.new_empty(x.shape), torch.empty_like(weight)
    product(dx, counts, (dout, Matrices.back(weight)))
    weight_gradient(dweight, counts, dout, x)
    return dx, dweight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """See `farspan.kernels.grouped_loop.swiglu`; float32, bfloat16 or float16."""
    inner = x.new_empty(len(x), gate.shape[1])
    _by_rows(
        kernels.swiglu_kernel, lambda tiles: tiles.swiglu, counts, inner.shape[1], x.shape[1],
        Rows.of(inner), Rows.of(x), Matrices.of(gate), Matrices.of(up),
    )  # fmt: skip
    return linear(inner, down, counts)


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `farspan.kernels.grouped_loop.swiglu_backward`."""
    dx, (dgate, dup, ddown) = x.new_empty(x.shape), (torch.empty_like(weight) for weight in (gate, up, down))
    inner, dgated, draised = (x.new_empty(len(x), gate.shape[1]) for _ in range(3))
    _by_rows(
        kernels.swiglu_backward_kernel, lambda tiles: tiles.swiglu_backward, counts, inner.shape[1], x.shape[1],
        Rows.of(inner), Rows.of(dgated), Rows.of(draised), Rows.of(x), Rows.of(dout),
        Matrices.of(gate), Matrices.of(up), Matrices.back(down),
    )  # fmt: skip
    weight_gradient(ddown, counts, dout, inner)
    product(dx, counts, (dgated, Matrices.back(gate)), (draised, Matrices.back(up)))
    weight_gradient(dgate, counts, dgated, x)
    weight_gradient(dup, counts, draised, x)
    return dx, dgate, dup, ddown


def product(
    out: Tensor, counts: Sequence[int], first: tuple[Tensor, Matrices], second: tuple[Tensor, Matrices] | None = None
) -> None:
    """Set the first rows of `out` `[N, column]` to the product of rows `[N, depth]` and matrices, or of two the sum."""
    x, matrices = first
    y, others = second or (None, None)
    _by_rows(
        kernels.product_kernel, lambda tiles: tiles.product, counts, out.shape[1], x.shape[1],
        Rows.of(out), Rows.of(x), matrices, None if y is None else Rows.of(y), others,
    )  # fmt: skip


def weight_gradient(dweight: Tensor, counts: Sequence[int], dout: Tensor, x: Tensor) -> None:
    """Set dweight `[E, out, in]`, of any strides, to dout_e^T x_e of rows `[N, out]` and `[N, in]`."""
    width, depth = dweight.shape[1:]
    operands = Matrices.of(dweight), Rows.of(dout), Rows.of(x)
    tile = tiles_for(operands, width, depth).weight
    # The longest come first, so that no long one is begun when all others are done.
    stretches = sorted(row_tiles(counts, max(*counts, 1), empty=True), key=lambda part: part[1] - part[2])
    blocks = triton.cdiv(width, tile.columns) * triton.cdiv(depth, tile.depth)
    programs = len(stretches) * blocks
    _launch(kernels.weight_kernel, programs, tile, *operands, on_device(stretches, x.device), width, depth)


def row_tiles(counts: Sequence[int], rows: int, *, empty: bool = False) -> list[tuple[int, int, int]]:
    """Return (expert, first row, end) of stretches of an expert of at most so many rows; of those without, if asked."""
    tiles = []
    for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True)):
        starts = range(end - count, end, rows) or ([end] if empty else [])
        tiles += [(expert, start, min(start + rows, end)) for start in starts]
    return tiles


def on_device(tiles: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    """Return tiles as int32 `[tiles, 3]`; the host does not wait for the device."""
    return torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True)


def tiles_for(operands: Iterable[Rows | Matrices | None], width: int, depth: int) -> Tiles:
    """Return the tiles for operands of one dtype, by how they can be loaded."""
    there = [part for part in operands if part is not None]
    if there[0].pointer.dtype == torch.float32:
        return FLOAT32
    even = all(part.pointer.data_ptr() % EVEN == 0 for part in there)
    numbers = {width, depth, *(stride for part in there for stride in part[1:])} - {1}
    return HALF if even and not any(number % EVEN for number in numbers) else ODD_HALF


def _by_rows(
    kernel: Any,
    tile_of: Callable[[Tiles], Tile],
    counts: Sequence[int],
    width: int,
    depth: int,
    result: Rows,
    *operands: Rows | Matrices | None,
) -> None:
    """Launch a kernel for each tile of rows and block of columns of its result `[N, width]`."""
    tile = tile_of(tiles_for((result, *operands), width, depth))
    tiles = row_tiles(counts, tile.rows)
    programs = len(tiles) * triton.cdiv(width, tile.columns)
    _launch(
        kernel, programs, tile, result, *operands, on_device(tiles, result.pointer.device), len(tiles), width, depth
    )


def _launch(kernel: Any, programs: int, tile: Tile, *arguments: Any) -> None:
    """Start so many programs of a kernel, if any, on the device of its result."""
    if programs:
        with torch.cuda.device_of(arguments[0].pointer):
            kernel[(programs,)](
                *arguments, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
