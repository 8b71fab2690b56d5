# pyright: reportMissingImports=false
"""Products of rows, sorted by expert, with matrices of their expert: launches of the kernels.

The host knows how many rows an expert has, so it cuts them into tiles of one expert each: nothing waits for the device,
and an expert without rows costs nothing but the zeros of its gradients. No two programs write to the same place:
results have the same bits each time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from farspan.kernels.triton_kernels import grouped as kernels


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


@dataclass(frozen=True, slots=True, eq=False)
class Stretches:
    """Rows of each expert, and what the kernels of one pass are told of them, each made once and sent to the device."""

    counts: Sequence[int]
    device: torch.device
    made: dict[int, Tensor] = field(default_factory=dict)

    def tiles(self, rows: int) -> Tensor:
        """Return (expert, first row, end) of stretches of an expert of at most so many rows, int32 `[tiles, 3]`."""
        if rows not in self.made:
            self.made[rows] = self._send(row_tiles(self.counts, rows))
        return self.made[rows]

    def whole(self) -> Tensor:
        """Return the same of all rows of each expert, also of those without; the longest come first.

        So no long one is begun when all others are done.
        """
        if 0 not in self.made:
            ends = zip(range(len(self.counts)), self.counts, accumulate(self.counts), strict=True)
            stretches = [(expert, end - count, end) for expert, count, end in ends]
            self.made[0] = self._send(sorted(stretches, key=lambda part: part[1] - part[2]))
        return self.made[0]

    def _send(self, tiles: list[tuple[int, int, int]]) -> Tensor:
        # The host does not wait for the device.
        return torch.tensor(tiles, dtype=torch.int32).to(self.device, non_blocking=True)


def row_tiles(counts: Sequence[int], rows: int) -> list[tuple[int, int, int]]:
    """See `Stretches.tiles`."""
    return [
        (expert, start, min(start + rows, end))
        for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True))
        for start in range(end - count, end, rows)
    ]


def linear(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """See `farspan.kernels.moe.grouped_loop.linear`; float32, bfloat16 or float16."""
    out = x.new_empty(len(x), weight.shape[1])
    product(out, Stretches(counts, x.device), (x, Matrices.of(weight)))
    return out


def linear_backward(x: Tensor, weight: Tensor, counts: Sequence[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """See `farspan.kernels.moe.grouped_loop.linear_backward`."""
    dx, dweight, stretches = x.new_empty(x.shape), torch.empty_like(weight), Stretches(counts, x.device)
    product(dx, stretches, (dout, Matrices.back(weight)))
    weight_gradient(dweight, stretches, dout, x)
    return dx, dweight


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """See `farspan.kernels.moe.grouped_loop.swiglu`; float32, bfloat16 or float16."""
    out, inner, stretches = x.new_empty(x.shape), x.new_empty(len(x), gate.shape[1]), Stretches(counts, x.device)
    _by_rows(
        kernels.swiglu_kernel, lambda tiles: tiles.swiglu, stretches, inner.shape[1], x.shape[1],
        Rows.of(inner), Rows.of(x), Matrices.of(gate), Matrices.of(up),
    )  # fmt: skip
    product(out, stretches, (inner, Matrices.of(down)))
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `farspan.kernels.moe.grouped_loop.swiglu_backward`."""
    dx, (dgate, dup, ddown) = x.new_empty(x.shape), (torch.empty_like(weight) for weight in (gate, up, down))
    inner, dgated, draised = (x.new_empty(len(x), gate.shape[1]) for _ in range(3))
    stretches = Stretches(counts, x.device)
    _by_rows(
        kernels.swiglu_backward_kernel, lambda tiles: tiles.swiglu_backward, stretches, inner.shape[1], x.shape[1],
        Rows.of(inner), Rows.of(dgated), Rows.of(draised), Rows.of(x), Rows.of(dout),
        Matrices.of(gate), Matrices.of(up), Matrices.back(down),
    )  # fmt: skip
    weight_gradient(ddown, stretches, dout, inner)
    product(dx, stretches, (dgated, Matrices.back(gate)), (draised, Matrices.back(up)))
    weight_gradient(dgate, stretches, dgated, x)
    weight_gradient(dup, stretches, draised, x)
    return dx, dgate, dup, ddown


def product(
    out: Tensor, stretches: Stretches, first: tuple[Tensor, Matrices], second: tuple[Tensor, Matrices] | None = None
) -> None:
    """Set rows of `out` `[N, column]` to the product of rows `[N, depth]` and matrices, or to the sum of two."""
    x, matrices = first
    y, others = second or (None, None)
    _by_rows(
        kernels.product_kernel, lambda tiles: tiles.product, stretches, out.shape[1], x.shape[1],
        Rows.of(out), Rows.of(x), matrices, None if y is None else Rows.of(y), others,
    )  # fmt: skip


def weight_gradient(dweight: Tensor, stretches: Stretches, dout: Tensor, x: Tensor) -> None:
    """Set dweight `[E, out, in]`, of any strides, to dout_e^T x_e of rows `[N, out]` and `[N, in]`."""
    width, depth = dweight.shape[1:]
    operands = Matrices.of(dweight), Rows.of(dout), Rows.of(x)
    tile = tiles_for(operands, width, depth).weight
    programs = len(dweight) * triton.cdiv(width, tile.columns) * triton.cdiv(depth, tile.depth)
    _launch(kernels.weight_kernel, programs, tile, *operands, stretches.whole(), width, depth)


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
    stretches: Stretches,
    width: int,
    depth: int,
    result: Rows,
    *operands: Rows | Matrices | None,
) -> None:
    """Launch a kernel for each tile of rows and block of columns of its result `[N, width]`."""
    tile = tile_of(tiles_for((result, *operands), width, depth))
    tiles = stretches.tiles(tile.rows)
    programs = len(tiles) * triton.cdiv(width, tile.columns)
    _launch(kernel, programs, tile, result, *operands, tiles, len(tiles), width, depth)


def _launch(kernel: Any, programs: int, tile: Tile, *arguments: Any) -> None:
    """Start so many programs of a kernel, if any, on the device of its result."""
    if programs:
        with torch.cuda.device_of(arguments[0].pointer):
            kernel[(programs,)](
                *arguments, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
