"""The benchmark of experts: SwiGLUs of rows with matrices of their experts, beside one matrix for all rows.

Legend: N rows, C width, F inner size, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from farspan.tools.bench.case import Attention
from farspan.tools.bench.check import Expected, Run, Verdict, compare, outcome
from farspan.tools.bench.report import Report, Table
from farspan.tools.bench.run import Bench, Record, Result
from farspan.tools.bench.timing import DIRECTIONS, Pass, warm_pass

aten = torch.ops.aten

BOTH = "fwd_bwd"
PRODUCTS = {"fwd": 3, "bwd": 8, "fwd_bwd": 11}
"""Products of N x C x F by direction; in the backward pass, two compute gate and up again."""
RESULTS = ("out", "dx", "dgate", "dup", "ddown")
WARM_UPS = {"cpu": 1, "cuda": 2}
MULTIPLE = {"cpu": 1, "cuda": 16}
"""Counts are multiples of it: torch's own products want 16 bytes, in 16-bit dtypes too."""
NOTES = """{experts} experts, {rows} rows in all, of width {width} with matrices of inner size {inner}, {dtype}.
`skewed`: counts in proportion to 1, 1/2, 1/3, ..., and none for a tenth of the experts: {skewed}. Milliseconds are
medians of {rounds} rounds; `shortest` is the shortest round, forward and backward; every row runs once per round.
`speed over dense` is the time of one matrix for all rows over this one's, forward and backward: the median of the
rounds' ratios, with the `lowest` and `highest` round. Dense SwiGLU is torch's products and as many FLOPs as the
experts': the backward pass computes gate and up again (11 products instead of 9), unless it keeps them. Every row was
checked in the same run against float64.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How many rows each expert has, and the widths of rows and matrices."""

    name: str
    counts: tuple[int, ...]
    width: int
    inner: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def inputs(self, experts: int) -> list[Tensor]:
        """Return normal rows and matrices of so many experts; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        wide, inner = self.width, self.inner
        shapes = [(self.rows, wide), (experts, inner, wide), (experts, inner, wide), (experts, wide, inner)]
        drawn = [torch.randn(shape, generator=generator, device=self.device) for shape in shapes]
        scales = [1.0, *(shape[-1] ** -0.5 for shape in shapes[1:])]
        return [x.mul_(scale).to(self.dtype).requires_grad_() for x, scale in zip(drawn, scales, strict=True)]

    def gradient(self) -> Tensor:
        """Return a normal gradient of the result."""
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(self.rows, self.width, generator=generator, device=self.device).to(self.dtype)

    def small(self) -> "Load":
        """Return a load like it of about an eighth of the rows, to be checked before it is measured."""
        step = MULTIPLE[self.device.type]
        return replace(self, counts=tuple(-(-count // (8 * step)) * step for count in self.counts))

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} rows, {self.width} x {self.inner}, {self.dtype}"


def even_counts(experts: int, rows: int) -> tuple[int, ...]:
    """Return as many rows for each expert, one more for the first ones if need be."""
    return tuple(rows // experts + (expert < rows % experts) for expert in range(experts))


def skewed_counts(experts: int, rows: int) -> tuple[int, ...]:
    """Return rows in proportion to 1, 1/2, 1/3, ... and none for a tenth of the experts, in a shuffled order."""
    shares = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    shares[experts - experts // 10 :] = 0
    counts = (shares / shares.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return tuple(counts[torch.randperm(experts, generator=torch.Generator().manual_seed(0))].tolist())


@dataclass(frozen=True, slots=True)
class ExpertContender:
    """dense: whether it is one matrix for all rows, the baseline of the others."""

    name: str
    plan: Callable[[Load], Attention]
    dense: bool = False

    def counts(self, load: Load) -> tuple[int, ...]:
        return (load.rows,) if self.dense else load.counts

    def inputs(self, load: Load) -> list[Tensor]:
        return load.inputs(len(self.counts(load)))


class _DenseSwiglu(torch.autograd.Function):
    """One SwiGLU by torch's products; gate and up are computed again, as the experts' are: the same FLOPs."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        return grouped_loop.swiglu(x, gate, up, down, (len(x),))

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, up, down = ctx.saved_tensors
        return grouped_loop.swiglu_backward(x, gate, up, down, (len(x),), dout)


def _kept_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate[0])) * F.linear(x, up[0]), down[0])


def _torch_swiglu(load: Load) -> Attention:
    ends = torch.tensor(load.counts, device=load.device).cumsum(0).to(torch.int32)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return aten._grouped_mm(x, weight.transpose(1, 2), ends)

    return lambda x, gate, up, down: multiply(F.silu(multiply(x, gate)) * multiply(x, up), down)


def _grouped_swiglu(load: Load) -> Attention:
    return lambda x, gate, up, down: grouped_swiglu(x, gate, up, down, load.counts)


OURS = [ExpertContender("grouped_swiglu", _grouped_swiglu)]
DENSE = [
    ExpertContender("dense SwiGLU", lambda load: _DenseSwiglu.apply, dense=True),
    ExpertContender("dense SwiGLU that keeps gate and up", lambda load: _kept_swiglu, dense=True),
]
BASELINES = [ExpertContender("torch._grouped_mm, SwiGLU that keeps gate and up", _torch_swiglu)]
"""On CUDA only: torch's own, which takes bfloat16."""


def formula(counts: Sequence[int]) -> Attention:
    """Return the SwiGLUs written down expert by expert, with torch's own gradients."""

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        parts = enumerate(x.split(list(counts)))
        return torch.cat(
            [_kept_swiglu(rows, *(weight[expert : expert + 1] for weight in weights)) for expert, rows in parts]
        )

    return run


def run_of(contender: ExpertContender, load: Load) -> Run:
    """Return the computation of out and all gradients."""
    inputs, dout = contender.inputs(load), load.gradient()
    idle = torch.tensor([not count for count in contender.counts(load)], device=load.device)

    def run() -> list[Tensor]:
        found = outcome(contender.plan(load), inputs, dout)
        if any(bool(gradient[idle].any()) for gradient in found[2:]):
            raise ArithmeticError("an expert without rows has a gradient")
        return found

    return run


def verdict(contender: ExpertContender, load: Load) -> Verdict:
    """Compare out and all gradients with the formula in float64; gradients of experts without rows have to be 0."""
    truth = formula(contender.counts(load))

    def expect() -> Expected:
        return Expected.of(truth, truth, contender.inputs(load), load.gradient())

    return compare(str(load), lambda: run_of(contender, load), expect, names=RESULTS)


CHECKED_SIZES = ((256, 128), (200, 100))
"""Multiples of 16, which are loaded 16 bytes at a time, and others."""
CHECKED_COUNTS = {
    "skewed": skewed_counts(20, 1500),
    "one expert has all": (0, 0, 700, 0),
    "one row": (0, 1, 0),
    "none": (0, 0, 0),
}


def checks(device: torch.device) -> Iterator[Load]:
    """Yield the loads that a device's kernels have to compute right."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width, inner in CHECKED_SIZES:
            for name, counts in CHECKED_COUNTS.items():
                yield Load(name=name, counts=counts, width=width, inner=inner, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """A load as one contender computes it."""

    contender: ExpertContender
    load: Load

    @property
    def name(self) -> str:
        return f"{self.load.name} by {self.contender.name}"


@final
class ExpertBench(Bench[ExpertRow]):
    """Rows of one process; matrices and rows are shared by all that have as many."""

    def __init__(self, loads: Sequence[Load]) -> None:
        super().__init__()
        self.loads = loads

    def rows(self) -> list[ExpertRow]:
        contenders = [*DENSE, *OURS, *(BASELINES if self.loads[0].device.type == "cuda" else [])]
        return [ExpertRow(contender, load) for load in self.loads for contender in contenders]

    def check(self, row: ExpertRow) -> Verdict:
        return verdict(row.contender, row.load.small())

    def start(self, row: ExpertRow, size: int) -> Pass:
        inputs = self.shared(row.contender.dense, lambda: row.contender.inputs(row.load))
        dout = self.shared("dout", row.load.gradient)
        return warm_pass(row.contender.plan(row.load), inputs, dout, WARM_UPS[row.load.device.type])

    def is_baseline(self, other: ExpertRow, row: ExpertRow) -> bool:
        return other.contender is DENSE[0] and other.load == row.load

    def records(self, result: Result[ExpertRow]) -> list[Record]:
        load, records = result.row.load, []
        for direction in DIRECTIONS:
            ms = None if result.times is None else result.times.median(direction)
            flops = 2 * load.rows * load.width * load.inner * PRODUCTS[direction]
            records.append(
                {
                    "products": result.row.contender.name,
                    "load": load.name,
                    "device": load.device.type,
                    "dtype": str(load.dtype).removeprefix("torch."),
                    "experts": len(load.counts),
                    "rows": load.rows,
                    "width": load.width,
                    "inner": load.inner,
                    "direction": direction,
                    "ms": ms,
                    "tflops": None if ms is None else flops / ms / 1e9,
                    "of_dense": result.speedup(direction),
                    "correct": result.verdict.correct,
                }
            )
        return records

    def report(self, machine: Mapping[str, str]) -> Report:
        load, skewed = self.loads[0], max(self.loads, key=lambda load: max(load.counts))
        counts = " ".join(map(str, sorted(skewed.counts, reverse=True)))
        rounds = max((len(result.times.fwd) for result in self.results if result.times is not None), default=0)
        notes = NOTES.format(
            experts=len(load.counts), rows=load.rows, width=load.width, inner=load.inner, rounds=rounds, skewed=counts,
            dtype=str(load.dtype).removeprefix("torch."),
        )  # fmt: skip
        title = f"Products of experts, forward and backward: {machine.get('gpu') or machine['cpu']}"
        return self.report_with(machine, title=title, notes=notes, tables=[Table.of_results(COLUMNS, self.results, 2)])


COLUMNS = {
    "load": lambda result: result.row.load.name,
    "products": lambda result: result.row.contender.name,
    "forward ms": lambda result: result.times.median("fwd"),
    "backward ms": lambda result: result.times.median("bwd"),
    "both ms": lambda result: result.times.median(BOTH),
    "shortest ms": lambda result: result.times.shortest(BOTH),
    "TFLOP/s": lambda result: result.records[-1]["tflops"],
    "speed over dense": lambda result: result.speedup(BOTH),
    "lowest": lambda result: min(result.speedups(BOTH), default=None),
    "highest": lambda result: max(result.speedups(BOTH), default=None),
}
