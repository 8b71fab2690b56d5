"""SwiGLU by many experts as a loop over experts, on any device; on CPUs, small experts run in threads of their own.

Threads that multiply one small matrix together wait for each other, on a busy machine for longer than they compute: for
64 products of 128 rows, two threads took 1.5 times as long as with 32 products for each of them (docs/log.md).

Legend: N rows, C width, F inner size, E experts; an expert has the next counts[e] rows. The host must know these: it
waits for a device.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

CHUNK_ROWS = 4096
"""Rows of an expert whose inner values exist at the same time: a hot expert takes no more memory than even ones.

Gradients of weights are rounded once for each chunk.
"""
SHARED_ROWS = 1024
"""Rows from which on all threads work on an expert together."""


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """Return down_e(silu(gate_e(x)) * up_e(x)), like x `[N, C]`; gate, up `[E, F, C]`, down `[E, C, F]`.

    counts: int64 `[E]`; rows after those of the last expert give 0.
    """
    rows, ends = counts.tolist(), counts.cumsum(0).tolist()
    out = x.new_empty(x.shape)
    out[sum(rows) :] = 0

    def work(expert: int) -> None:
        for part in _chunks(ends[expert] - rows[expert], ends[expert]):
            # [rows, F]
            inner = F.silu(x[part] @ gate[expert].t(), inplace=True).mul_(x[part] @ up[expert].t())
            torch.mm(inner, down[expert].t(), out=out[part])

    for_each_expert(rows, x.device, work)
    return out


def swiglu_backward(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dgate, dup and ddown, each like its input; gate and up of the rows are computed again."""
    rows, ends = counts.tolist(), counts.cumsum(0).tolist()
    dx, dout = x.new_empty(x.shape), dout.contiguous()
    dx[sum(rows) :] = 0
    dgate, dup, ddown = _gradients(rows, gate, up, down)

    def work(expert: int) -> None:
        first = ends[expert] - rows[expert]
        for part in _chunks(first, ends[expert]):
            x_rows, dout_rows, dx_rows = x[part], dout[part], dx[part]
            # The first chunk sets gradients of weights, whatever their memory holds; later ones add to them.
            beta = int(part.start > first)
            # [rows, F]
            gated, raised = x_rows @ gate[expert].t(), x_rows @ up[expert].t()
            silu = F.silu(gated)
            dinner = dout_rows @ down[expert]
            ddown[expert].addmm_(dout_rows.t(), silu * raised, beta=beta)
            # In place, as each of these is as large as the rows' inner values.
            draised = silu.mul_(dinner)
            dgated = aten.silu_backward(dinner.mul_(raised), gated)
            dgate[expert].addmm_(dgated.t(), x_rows, beta=beta)
            dup[expert].addmm_(draised.t(), x_rows, beta=beta)
            torch.mm(dgated, gate[expert], out=dx_rows)
            dx_rows.addmm_(draised, up[expert])

    for_each_expert(rows, x.device, work)
    return dx, dgate, dup, ddown


def _gradients(counts: Sequence[int], *weights: Tensor) -> list[Tensor]:
    """Return empty gradients of weights, 0 for experts without rows."""
    # Not zeros for all: filling memory twice takes a tenth of the time of a step of small experts.
    gradients = [torch.empty_like(weight) for weight in weights]
    for expert, count in enumerate(counts):
        if not count:
            for gradient in gradients:
                gradient[expert].zero_()
    return gradients


def _chunks(start: int, end: int) -> Iterator[slice]:
    """Yield the rows from start to end, at most CHUNK_ROWS at a time."""
    for first in range(start, end, CHUNK_ROWS):
        yield slice(first, min(first + CHUNK_ROWS, end))


def for_each_expert(counts: Sequence[int], device: torch.device, work: Callable[[int], None]) -> None:
    """Call `work` once for each expert that has rows; no two may write to the same rows or matrices."""
    threads, busy = torch.get_num_threads(), [expert for expert, count in enumerate(counts) if count]
    small = [expert for expert in busy if counts[expert] < SHARED_ROWS]
    if threads == 1 or device.type != "cpu" or len(small) < 2:
        small = []
    for expert in busy:
        if not small or counts[expert] >= SHARED_ROWS:
            work(expert)
    if small:
        _in_threads(share_out(small, counts, threads), threads, work)


def share_out(experts: Sequence[int], counts: Sequence[int], shares: int) -> list[list[int]]:
    """Return lists of experts with about as many rows each: the largest goes first, to the shortest list."""
    lists: list[list[int]] = [[] for _ in range(shares)]
    rows = [0] * shares
    for expert in sorted(experts, key=lambda expert: -counts[expert]):
        least = rows.index(min(rows))
        lists[least].append(expert)
        rows[least] += counts[expert]
    return lists


def _in_threads(lists: list[list[int]], threads: int, work: Callable[[int], None]) -> None:
    def run(experts: list[int]) -> None:
        # Both settings are per thread; threads that start meanwhile take the first one over, so it is reset below.
        torch.set_num_threads(1)
        with torch.no_grad():
            for expert in experts:
                work(expert)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, lists))
    finally:
        torch.set_num_threads(threads)
