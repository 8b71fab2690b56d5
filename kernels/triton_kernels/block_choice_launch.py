# pyright: reportMissingImports=false
"""Choices of blocks on a device: launches of the kernels, whose number does not grow with the sequence.

Nothing waits for the device. What rows and blocks decide is planned on the host and sent once per sequence.

Legend: Q queries (rows, or tiles of rows), Hq query heads, Hk KV heads, D head size.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.masks.packed_selection import num_words, number_dtype
from farspan.kernels.planning import choice_tiles
from farspan.kernels.planning.choice_tiles import ChoiceTiles, Ranking
from farspan.kernels.triton_kernels import block_choice as kernels
from farspan.kernels.triton_kernels import block_means, chunked_choice
from farspan.kernels.triton_kernels.block_choice import Rule, Scores, Strided
from farspan.kernels.triton_kernels.block_means import Members, Shift

VALUES = 4096
"""Numbers of rows that a program sums at a time, or of sums that it turns into means, which fits into registers."""
PROGRAMS = 264
"""Programs that choose in chunks, at most: two for each multiprocessor of an H100."""
SCRATCH_BYTES = 1 << 30
"""What they write down at the same time, unless a single one needs more."""


class Shape(NamedTuple):
    """Blocks that are scored at a time, queries of a tile that choose together, and warps."""

    blocks: int
    queries: int
    warps: int


def shape_for(blocks: int, ranking: Ranking) -> Shape:
    """Return the shape of tiles of a size."""
    # Found by compiling for an H100 (docs/kernels_sm90.md): scores that fit into registers, 32 or 64 for each thread.
    # With as many threads as blocks, means reach registers through shared memory, 16 bytes at a time.
    if blocks > choice_tiles.MAX_BLOCKS:
        # Chunks: few blocks for many queries, each of which uses the means that were loaded.
        return Shape(256, 32, 8) if ranking.weights == "none" else Shape(128, 16, 8)
    warps = min(blocks // 32, 8)
    values = 64 if ranking.weights == "none" and blocks <= 512 else 32
    return Shape(blocks, values * 32 * warps // blocks, warps)


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Start the programs of a kernel, if any."""
    if programs:
        kernel[(programs,)](*arguments, **options)


def sums(
    x: Tensor, members: Members, *, plain: bool = True, unit: bool = False, weight: Tensor | None = None,
    shift: Shift | None = None,
) -> Tensor:  # fmt: skip
    """Sum the rows of x `[rows, heads, D]` in each block, float64 `[kinds, blocks, heads, D]`; see `sums_kernel`."""
    blocks, (_, heads, width) = len(members.offsets) - 1, x.shape
    total = torch.empty(plain + unit, blocks, heads, width, dtype=torch.float64, device=x.device)
    padded = triton.next_power_of_2(width)
    launch(
        block_means.sums_kernel, blocks * heads, total, Strided.of(x), members, weight, shift, blocks, HEADS=heads,
        WIDTH=width, PADDED=padded, ROWS=min(max(VALUES // padded, 1), 32), PLAIN=plain, UNIT=unit, num_warps=8,
    )  # fmt: skip
    return total


def means(total: Tensor, counts: Tensor, which: Tensor | None = None) -> Tensor:
    """Return the means of blocks, of their sums `[blocks, heads, D]`: float64 `[heads, D, blocks of which]`."""
    blocks = len(total) if which is None else len(which)
    found = torch.empty(*total.shape[1:], blocks, dtype=torch.float64, device=total.device)
    _of_blocks(block_means.means_kernel, found, total, counts, which, blocks)
    return found


def similar(total: Tensor, counts: Tensor, threshold: float, which: Tensor | None = None) -> Tensor:
    """Return whose mean cosine exceeds the threshold, int8 `[heads, blocks of which]`; total: of unit rows."""
    blocks = len(total) if which is None else len(which)
    found = torch.empty(total.shape[1], blocks, dtype=torch.int8, device=total.device)
    _of_blocks(block_means.similar_kernel, found, total, counts, which, blocks, threshold)
    return found


def _of_blocks(
    kernel: Any, found: Tensor, total: Tensor, counts: Tensor, which: Tensor | None, blocks: int, *arguments: float
) -> None:
    (_, heads, width), padded = total.shape, triton.next_power_of_2(total.shape[2])
    at_once = max(VALUES // padded, 1)
    launch(
        kernel, triton.cdiv(blocks, at_once) * heads, found, total, counts, which, blocks, *arguments,
        HEADS=heads, WIDTH=width, PADDED=padded, BLOCKS=at_once,
    )  # fmt: skip


def choose(
    q: Tensor,
    block_means: Tensor,
    tiles: tuple[ChoiceTiles, ...],
    rule: Rule,
    ranking: Ranking,
    *,
    most: int,
    numbered: bool,
    scale: float = 1.0,
) -> Tensor:
    """Return the blocks that each query chooses, as bits or numbers; see `PackedSelection.stored`.

    q: `[Q, Hq, D]`. block_means: float64 `[Hk, D, blocks]`. most: the greatest number that the ranking chooses.
    """
    (queries, heads, head_dim), (kv_heads, _, blocks) = q.shape, block_means.shape
    width, dtype = (most, number_dtype(blocks)) if numbered else (num_words(blocks), torch.int32)
    chosen = torch.full((queries, heads, width), -1 if numbered else 0, dtype=dtype, device=q.device)
    scores = Scores(Strided.of(q), block_means, blocks, head_dim, scale, tl.constexpr(heads), tl.constexpr(kv_heads))
    constants = {
        "WEIGHTS": ranking.weights, "SHARE": ranking.share, "OWN_COUNTS": ranking.own_counts, "SINK": ranking.sink,
        "NUMBERED": numbered,
    }  # fmt: skip
    for some in tiles:
        given, programs = (scores, some.table, rule), len(some.table) * heads
        shape = shape_for(some.blocks, ranking)
        constants |= {"BLOCKS": shape.blocks, "ROWS": some.queries, "num_warps": shape.warps}
        if not some.in_chunks:
            launch(kernels.choose_kernel, programs, chosen, *given, queries, width, most, **constants)
            continue
        # The best of each chunk.
        num_best = min(most, shape.blocks) * (some.blocks // shape.blocks) if ranking.weights == "none" else 0
        size = (some.blocks + num_best) * some.queries
        programs = min(programs, PROGRAMS, max(SCRATCH_BYTES // (4 * size), 1))
        keys = torch.empty(programs * size, dtype=torch.int32, device=q.device)
        launch(
            chunked_choice.choose_chunked_kernel, programs, chosen, keys, *given, len(some.table), queries, width, most,
            some.blocks, num_best, **constants,
        )  # fmt: skip
    return chosen
