"""Measure SwiGLUs of rows with matrices of their experts, beside one matrix for all rows: the same FLOPs.

Writes JSON and Markdown. Each row is checked against float64 in the same run; a wrong one gets no number:
`python -m farspan.tools.bench_experts --device cpu`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from farspan.parallel.ranks import Ranks, connected
from farspan.tools import command
from farspan.tools.bench import run
from farspan.tools.bench.case import Attention, dtype_name
from farspan.tools.bench.check import Verdict, compare, expected_of, outcome
from farspan.tools.bench.report import Record, default_out, machine_facts, processor
from farspan.tools.bench.run import Bench, Columns, Limits, Pass, Result

DEFAULTS = {
    "cpu": {"rows": 8192, "width": 1024, "inner": 512, "dtype": "float32", "rounds": 7},
    "cuda": {"rows": 65536, "width": 2048, "inner": 1024, "dtype": "bfloat16", "rounds": 20},
}
"""On a CPU: a layer of 1024 tokens, 8 of 64 experts each, as fine-grained mixtures have them (arXiv 2401.06066)."""
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
        """Return normal rows and matrices of a number of experts; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        wide, inner = self.width, self.inner
        shapes = [(self.rows, wide), (experts, inner, wide), (experts, inner, wide), (experts, wide, inner)]
        drawn = [torch.randn(shape, generator=generator, device=self.device) for shape in shapes]
        scales = [1.0, *(shape[-1] ** -0.5 for shape in shapes[1:])]
        return [x.mul_(scale).to(self.dtype).requires_grad_() for x, scale in zip(drawn, scales, strict=True)]

    def gradient(self) -> Tensor:
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


class _DenseSwiglu(torch.autograd.Function):
    """One SwiGLU by torch's products; gate and up are computed again, as the experts' are: the same FLOPs."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, up, down)
        return grouped_loop.swiglu(x, gate, up, down, torch.tensor([len(x)]))

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate, up, down = ctx.saved_tensors
        return grouped_loop.swiglu_backward(x, gate, up, down, torch.tensor([len(x)]), dout)


def _kept_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate[0])) * F.linear(x, up[0]), down[0])


def _torch_swiglu(load: Load) -> Attention:
    ends = torch.tensor(load.counts, device=load.device).cumsum(0).to(torch.int32)

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten._grouped_mm(x, weight.transpose(1, 2), ends)

    return lambda x, gate, up, down: multiply(F.silu(multiply(x, gate)) * multiply(x, up), down)


def _grouped_swiglu(load: Load) -> Attention:
    counts = torch.tensor(load.counts, device=load.device)
    return lambda x, gate, up, down: grouped_swiglu(x, gate, up, down, counts)


OURS = ExpertContender("grouped_swiglu", _grouped_swiglu)
DENSE = ExpertContender("dense SwiGLU", lambda load: _DenseSwiglu.apply, dense=True)
DENSE_KEPT = ExpertContender("dense SwiGLU that keeps gate and up", lambda load: _kept_swiglu, dense=True)
TORCH = ExpertContender("torch._grouped_mm, SwiGLU that keeps gate and up", _torch_swiglu)
"""On CUDA only: torch's own, which takes bfloat16."""


def formula(x: Tensor, *weights: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the SwiGLUs written down expert by expert, with torch's own gradients."""
    parts = x.split(list(counts))
    of_experts = zip(*(weight.split(1) for weight in weights), strict=True)
    return torch.cat([_kept_swiglu(rows, *of_expert) for rows, of_expert in zip(parts, of_experts, strict=True)])


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """A load as one contender computes it."""

    contender: ExpertContender
    load: Load

    @property
    def name(self) -> str:
        return f"{self.load.name} by {self.contender.name}"

    @property
    def counts(self) -> tuple[int, ...]:
        return (self.load.rows,) if self.contender.dense else self.load.counts

    def inputs(self) -> list[Tensor]:
        return self.load.inputs(len(self.counts))

    def run(self) -> list[Tensor]:
        """Return out and all gradients; raises ArithmeticError unless those of experts without rows are 0."""
        found = outcome(self.contender.plan(self.load), self.inputs(), self.load.gradient())
        idle = torch.tensor([not count for count in self.counts], device=self.load.device)
        if any(bool(gradient[idle].any()) for gradient in found[2:]):
            raise ArithmeticError("an expert without rows has a gradient")
        return found

    def verdict(self) -> Verdict:
        """Compare out and all gradients with the formula in float64."""
        truth = partial(formula, counts=self.counts)
        expect = partial(expected_of, truth, truth, self.inputs(), self.load.gradient())
        return compare(str(self.load), lambda: self.run, expect, names=RESULTS)


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


@final
class ExpertBench(Bench[ExpertRow]):
    """Rows of one process; matrices and rows are shared by all that have as many."""

    def check(self, row: ExpertRow) -> Verdict:
        return ExpertRow(row.contender, row.load.small()).verdict()

    def start(self, row: ExpertRow, size: int) -> Pass:
        inputs = self.shared(row.contender.dense, row.inputs)
        dout = self.shared("dout", row.load.gradient)
        return run.warm_pass(row.contender.plan(row.load), inputs, dout, WARM_UPS[row.load.device.type])

    def is_baseline(self, other: ExpertRow, row: ExpertRow) -> bool:
        return other.contender is DENSE and other.load == row.load

    def records(self, result: Result[ExpertRow]) -> list[Record]:
        load, records = result.row.load, []
        for direction in run.DIRECTIONS:
            ms = result.ms(direction)
            flops = 2 * load.rows * load.width * load.inner * PRODUCTS[direction]
            records.append(
                {
                    "products": result.row.contender.name,
                    "load": load.name,
                    "device": load.device.type,
                    "dtype": dtype_name(load.dtype),
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


COLUMNS: Columns = {
    "load": lambda result: result.row.load.name,
    "products": lambda result: result.row.contender.name,
    **run.TIMES,
    "TFLOP/s": lambda result: result.records[-1]["tflops"],
    "speed over dense": lambda result: result.speedup("fwd_bwd"),
    "lowest": lambda result: min(result.speedups("fwd_bwd"), default=None),
    "highest": lambda result: max(result.speedups("fwd_bwd"), default=None),
}


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> list[Path]:
    device, dtype, step = command.device_of(options.device), command.DTYPES[options.dtype], MULTIPLE[options.device]
    sizes = {"width": options.width, "inner": options.inner, "dtype": dtype, "device": device}
    even, skewed = (
        Load(name=name, counts=tuple(step * count for count in counts(options.experts, options.rows // step)), **sizes)
        for name, counts in (("even", even_counts), ("skewed", skewed_counts))
    )
    facts = machine_facts(device, "bench_experts", arguments)
    contenders = [DENSE, DENSE_KEPT, OURS, *([TORCH] if device.type == "cuda" else [])]
    rows = [ExpertRow(contender, load) for load in (even, skewed) for contender in contenders]
    found, limits = ExpertBench(), Limits(rounds=options.rounds, rounds_until=time.monotonic() + options.budget_s)
    # As in training, where a rank keeps the memory of its gradients from step to step.
    with connected(Ranks(), device):
        found.measure(found.check_all(rows), [even.rows], limits)
    notes = NOTES.format(
        experts=options.experts, rows=even.rows, width=options.width, inner=options.inner, dtype=options.dtype,
        skewed=" ".join(map(str, sorted(skewed.counts, reverse=True))),
        rounds=max((len(result.times or ()) for result in found.results), default=0),
    )  # fmt: skip
    title = f"Products of experts, forward and backward: {processor(facts)}"
    out, tables = options.out or default_out(facts, "experts"), [run.results_table(COLUMNS, found.results, 2)]
    return found.write(out, facts, title=title, notes=notes, tables=tables, plot=None)


def main(arguments: Sequence[str]) -> int:
    parser = command.benchmark_parser(__doc__)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, help="of all experts together")
    parser.add_argument("--width", type=int)
    parser.add_argument("--inner", type=int)
    parser.add_argument("--dtype", choices=command.DTYPES)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="fewer rounds after this many seconds")
    least = {"rounds": run.FEWEST_ROUNDS, "experts": 1, "rows": 1, "width": 1, "inner": 1}
    options = command.parse(parser, arguments, DEFAULTS, **least)
    return command.print_all(lambda: bench(options, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
