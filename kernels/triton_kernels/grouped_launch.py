# pyright: reportMissingImports=false
"""Products of rows, sorted by expert, with the matrices of their experts: launches of the kernels.

The host knows how many rows an expert has, so it cuts them into tiles of one expert each: nothing waits for the device,
and an expert without rows costs nothing but the zeros of its gradients. No two programs write to the same row: results
have the same bits each time.

Legend: N rows, C width, F inner size, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
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
    kernels.swiglu_backward_kernel: (Tile(128, 64, 64, 8, 3), Tile(64, 64, 32, 8, 2), Tile(64, 32, 16, 8, 2)),
    kernels.weight_kernel: (Tile(64, 128, 128, 8, 3), Tile(32, 64, 64, 8, 2), Tile(16, 64, 64, 8, 2)),
}
"""The tile of each kernel for 16 bits, for 16 bits at odd places, and for float32.

Where rows do not start at multiples of 16 elements, every element is a load of its own, which takes registers. Exact
float32 products run on ordinary cores, from registers: for checks, not for speed.
"""
EVEN = 16
"""Triton compiles for pointers, strides and sizes that are multiples of it, and for others."""


class Rows(NamedTuple):
    """Rows `[N, width]` whose width has stride 1."""

    pointer: Tensor
    row_stride: int

    @staticmethod
    def of(x: Tensor) -> "Rows":
        """Return `x`, or a copy of it if its width has another stride."""
        x = x if x.stride(1) == 1 else x.contiguous()
        return Rows(x, x.stride(0))


class Matrices(NamedTuple):
    """A matrix `[depth, columns]` of each expert with any strides."""

    pointer: Tensor
    expert_stride: int
    column_stride: int
    depth_stride: int

    @staticmethod
    def of(matrices: Tensor) -> "Matrices":
        return Matrices(matrices, matrices.stride(0), matrices.stride(2), matrices.stride(1))


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """The rows of each expert as tiles, each kind made once and sent to the device."""

    counts: Sequence[int]
    device: torch.device
    made: dict[int, Tensor] = field(default_factory=dict)

    def tiles(self, rows: int) -> Tensor:
        """Return (expert, first row, end) of tiles of at most this many rows of an expert, int32 `[tiles, 3]`."""
        if rows not in self.made:
            self.made[rows] = self._send(row_tiles(self.counts, rows))
        return self.made[rows]

    def experts(self) -> Tensor:
        """Return (expert, first row, end) of every expert, also of those without rows, int32 `[E, 3]`."""
        if 0 not in self.made:
            ends = zip(range(len(self.counts)), self.counts, accumulate(self.counts), strict=True)
            experts = [(expert, end - count, end) for expert, count, end in ends]
            # The longest come first, so that none of them starts when all others are done.
            self.made[0] = self._send(sorted(experts, key=lambda expert: expert[1] - expert[2]))
        return self.made[0]

    def _send(self, tiles: list[tuple[int, int, int]]) -> Tensor:
        # The host does not wait for the device.
        return torch.tensor(tiles, dtype=torch.int32).to(self.device, non_blocking=True)


def row_tiles(counts: Sequence[int], rows: int) -> list[tuple[int, int, int]]:
    """See `ExpertRows.tiles`."""
    return [
        (expert, start, min(start + rows, end))
        for expert, (count, end) in enumerate(zip(counts, accumulate(counts), strict=True))
        for start in range(end - count, end, rows)
    ]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """See `farspan.kernels.moe.grouped_loop.swiglu`; float32, bfloat16 or float16."""
    # [N, C], [N, F]
    out, inner, expert_rows = x.new_empty(x.shape), x.new_empty(len(x), gate.shape[1]), ExpertRows(counts, x.device)
    _by_rows(
        kernels.swiglu_kernel, expert_rows, inner.shape[1], x.shape[1],
        Rows.of(inner), Rows.of(x), Matrices.of(gate.mT), Matrices.of(up.mT),
    )  # fmt: skip
    product(out, expert_rows, (inner, down.mT))
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `farspan.kernels.moe.grouped_loop.swiglu_backward`."""
    dx, (dgate, dup, ddown) = x.new_empty(x.shape), (torch.empty_like(weight) for weight in (gate, up, down))
    # [N, F]: silu(x gate) * (x up), and the gradients of x gate and of x up.
    inner, dgated, draised = (x.new_empty(len(x), gate.shape[1]) for _ in range(3))
    expert_rows = ExpertRows(counts, x.device)
    _by_rows(
        kernels.swiglu_backward_kernel, expert_rows, inner.shape[1], x.shape[1],
        *(Rows.of(rows) for rows in (inner, dgated, draised, x, dout)),
        *(Matrices.of(matrices) for matrices in (gate.mT, up.mT, down)),
    )  # fmt: skip
    weight_gradient(ddown, expert_rows, dout, inner)
    product(dx, expert_rows, (dgated, gate), (draised, up))
    weight_gradient(dgate, expert_rows, dgated, x)
    weight_gradient(dup, expert_rows, draised, x)
    return dx, dgate, dup, ddown


def product(
    out: Tensor, expert_rows: ExpertRows, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None
) -> None:
    """Set rows of `out` `[N, columns]` to the product of rows `[N, depth]` and matrices `[E, depth, columns]`.

    Or to the sum of two such products.
    """
    x, matrices = first
    more = (None, None) if second is None else (Rows.of(second[0]), Matrices.of(second[1]))
    operands = Rows.of(out), Rows.of(x), Matrices.of(matrices), *more
    _by_rows(kernels.product_kernel, expert_rows, out.shape[1], x.shape[1], *operands)


def weight_gradient(dweight: Tensor, expert_rows: ExpertRows, dout: Tensor, x: Tensor) -> None:
    """Set dweight `[E, out, in]`, of any strides, to dout_e^T x_e of rows `[N, out]` and `[N, in]`."""
    width, depth = dweight.shape[1:]
    operands = Matrices.of(dweight.mT), Rows.of(dout), Rows.of(x)
    tile = tile_for(kernels.weight_kernel, operands, width, depth)
    programs = len(dweight) * triton.cdiv(width, tile.columns) * triton.cdiv(depth, tile.depth)
    _launch(kernels.weight_kernel, programs, tile, *operands, expert_rows.experts(), width, depth)


def tile_for(kernel: Any, operands: Iterable[Rows | Matrices | None], width: int, depth: int) -> Tile:
    """Return the tile of a kernel for operands of one dtype, by how they can be loaded."""
    even_half, odd_half, full = TILES[kernel]
    present = [part for part in operands if part is not None]
    if present[0].pointer.dtype == torch.float32:
        return full
    even = all(part.pointer.data_ptr() % EVEN == 0 for part in present)
    numbers = {width, depth, *(stride for part in present for stride in part[1:])} - {1}
    return even_half if even and not any(number % EVEN for number in numbers) else odd_half


def _by_rows(kernel: Any, expert_rows: ExpertRows, width: int, depth: int, *operands: Rows | Matrices | None) -> None:
    """Launch a kernel for each tile of rows and block of columns of its result `[N, width]`, its first operand."""
    tile = tile_for(kernel, operands, width, depth)
    tiles = expert_rows.tiles(tile.rows)
    _launch(kernel, len(tiles) * triton.cdiv(width, tile.columns), tile, *operands, tiles, len(tiles), width, depth)


def _launch(kernel: Any, programs: int, tile: Tile, *arguments: Any) -> None:
    """Start the programs of a kernel, if any, on the device of its result."""
    if programs:
        with torch.cuda.device_of(arguments[0].pointer):
            kernel[(programs,)](
                *arguments, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
