"""Measure attention: every mechanism of the registry by every backend of a device, beside what torch offers.

Writes JSON, Markdown and a plot. Each row is checked against float64 in the same run; a wrong one gets no number:
`python -m farspan.tools.bench_attention --tokens 8K,16K,32K`.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from farspan.kernels.cuda.packages import FlashAttn2
from farspan.parallel.ranks import Ranks, connected
from farspan.tools import command
from farspan.tools.bench import run
from farspan.tools.bench.baselines.flash_packages import installed_flash_attn
from farspan.tools.bench.baselines.flex import Flex
from farspan.tools.bench.baselines.public_moba import PublicMoBA
from farspan.tools.bench.case import BASELINE, Case, Shape, dtype_name, find_cases, gradient_of_out, inputs_of
from farspan.tools.bench.check import Checker, Verdict
from farspan.tools.bench.contenders import REFERENCE, Contender, Sdpa, our_backends
from farspan.tools.bench.on_rank import WARM_UPS, worker_pool
from farspan.tools.bench.report import Plot, Record, default_out, machine_facts, markdown_table, mib, processor
from farspan.tools.bench.run import Bench, Columns, Limits, Pass, Peaks, Result
from farspan.tools.command import human
from farspan.tools.rank_pool import RankError

CPU = {"tokens": "8K,16K,32K", "heads": "8:2", "head_dim": 64, "dtype": "float32", "rounds": 3, "case_s": 120.0}
CUDA = {"tokens": "8K,16K,32K,64K,128K,512K", "heads": "32:8", "head_dim": 128, "dtype": "bfloat16", "rounds": 20}
DEFAULTS = {"cpu": CPU, "cuda": CUDA | {"case_s": 5.0}}
ROUNDS_S = 15.0
"""Fewer rounds run where they would take longer."""
MATMULS = {"fwd": 2, "bwd": 5, "fwd_bwd": 7}
"""Matrix products that attention cannot avoid, by direction; backward computes the scores again, as is usual."""
NOTES = """Milliseconds are medians of 3 to {rounds} rounds; `shortest` is the shortest round, forward and backward.
Every row runs once per round, and a speed-up is the median of the rounds' ratios to dense causal attention over one
document by our fastest backend. Useful FLOPs count products over unmasked pairs only, 2 forward and 5 backward. The
ideal speed-up is the number of pairs of dense attention over that of the mechanism. Speed-up, TFLOP/s and peak are of
forward and backward together; the peak is above the inputs. Every row was checked in the same run against float64, at
the sizes listed below. A row without numbers failed: its numbers would mean nothing.
"""


def baselines_on(device: torch.device) -> list[Contender]:
    """Return what torch and installed packages offer on a device."""
    if device.type == "cpu":
        return [Sdpa("torch_sdpa", "FLASH_ATTENTION")]
    of_torch = [Sdpa("torch_sdpa_flash", "FLASH_ATTENTION"), Sdpa("torch_sdpa_cudnn", "CUDNN_ATTENTION"), Flex()]
    return [*of_torch, *installed_flash_attn(), *([] if FlashAttn2.find() is None else [PublicMoBA()])]


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """A case as one contender computes it."""

    contender: Contender
    case: Case

    @property
    def name(self) -> str:
        return f"{self.case.name} by {self.contender.name}"


@final
class AttentionBench(Bench[AttentionRow]):
    """Rows of one process, timed over inputs that they share."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self._checker = Checker(shape)

    def check(self, row: AttentionRow) -> Verdict:
        contender = row.contender
        return self._checker.check(contender, contender.name, row.case, lambda check: check.run_of(contender))

    def refuse(self, row: AttentionRow, verdict: Verdict) -> None:
        # Each baseline refuses most mechanisms.
        if not row.contender.is_baseline:
            super().refuse(row, verdict)

    def start(self, row: AttentionRow, size: int) -> Pass:
        mechanism, shape = row.case.mechanism, self.shape
        inputs = self.shared(mechanism.routing_width, lambda: inputs_of(mechanism, size, shape))
        dout = self.shared("dout", lambda: gradient_of_out(size, shape))
        attention = row.contender.plan(mechanism, row.case.rows(size), shape)
        return run.warm_pass(attention, inputs, dout, WARM_UPS[shape.device.type])

    def work(self, row: AttentionRow, size: int) -> float:
        return row.case.unmasked_pairs(size)

    def is_baseline(self, other: AttentionRow, row: AttentionRow) -> bool:
        return other.case.name == BASELINE and not other.contender.is_baseline

    def needs(self, row: AttentionRow, size: int) -> Peaks | None:
        """Return the peaks of a pass, on a CPU in a process of its own; None where this system does not report them."""
        of_row = row.contender, row.case, size, self.shape
        if self.shape.device.type == "cuda":
            return run.peaks_of_case(*of_row)
        try:
            with worker_pool(1, torch.get_num_threads(), "cpu") as pool:
                return pool.run(run.peaks_in_fresh_process, *of_row)[0]
        except RankError:
            return None

    def peaks_at(self, sizes: Sequence[int], limits: Limits) -> dict[str, list[int]]:
        """Return the peak at each size by row, measured only where the results do not have it.

        A row ends where the time budget does.
        """
        known = {(result.row.name, result.size): result.needs for result in self.results}
        found: dict[str, list[int]] = {}
        for name, (row, verdict) in self.checked.items():
            for size in sizes if verdict.correct else ():
                peaks = known.get((name, size))
                if peaks is None and not limits.reason_to_skip(None):
                    peaks = self.needs(row, size)
                if peaks is None:
                    break
                found.setdefault(name, []).append(peaks["fwd_bwd"])
        return found

    def records(self, result: Result[AttentionRow]) -> list[Record]:
        case, shape, tokens, records = result.row.case, self.shape, result.size, []
        pairs = case.unmasked_pairs(tokens)
        # The pairs of dense causal attention over one document, to those of the case.
        ideal = tokens * (tokens + 1) // 2 / max(pairs, 1)
        for direction in run.DIRECTIONS:
            ms, speedup = result.ms(direction), result.speedup(direction)
            records.append(
                {
                    "mechanism": case.name,
                    "backend": result.row.contender.name,
                    "device": shape.device.type,
                    "dtype": dtype_name(shape.dtype),
                    "tokens": tokens,
                    "heads": shape.heads.query,
                    "kv_heads": shape.heads.kv,
                    "head_dim": shape.head_dim,
                    "direction": direction,
                    "ms": ms,
                    "useful_tflops": None if ms is None else useful_flops(pairs, shape, direction) / ms / 1e9,
                    "speedup_over_dense": speedup,
                    "ideal_speedup": ideal,
                    "fraction_of_ideal": None if speedup is None else speedup / ideal,
                    "peak_bytes": None if result.needs is None else result.needs[direction],
                    "correct": result.verdict.correct,
                }
            )
        return records


def useful_flops(pairs: int, shape: Shape, direction: str) -> float:
    """Return the FLOPs of products over unmasked pairs: 2 per pair, query head and element; 2 products forward, 5 back.

    Where D differs from Dv, their mean stands for both.
    """
    return MATMULS[direction] * pairs * shape.heads.query * (shape.head_dim + shape.value_dim)


COLUMNS: Columns = {
    "mechanism": lambda result: result.row.case.name,
    "backend": lambda result: result.row.contender.name,
    **run.TIMES,
    "useful TFLOP/s": lambda result: result.records[-1]["useful_tflops"],
    "speed-up over dense": lambda result: result.records[-1]["speedup_over_dense"],
    "ideal speed-up": lambda result: result.records[-1]["ideal_speedup"],
    "share of the ideal": lambda result: result.records[-1]["fraction_of_ideal"],
    "peak MiB": lambda result: mib(result.records[-1]["peak_bytes"]),
}


def memory_table(memory: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> str:
    """Return the peaks by row, and the ratio of the last to the first beside that of the tokens."""
    lines = []
    for name, peaks in memory.items():
        growth = f"{peaks[-1] / peaks[0]:.1f}" if len(peaks) == len(sizes) and peaks[0] > 0 else ""
        lines.append([name, *map(mib, peaks), *[""] * (len(sizes) - len(peaks)), growth])
    columns = ["", *(f"{human(size)} MiB" for size in sizes), f"growth (tokens: {sizes[-1] / sizes[0]:g})"]
    return f"## Peak memory, forward and backward\n\n{markdown_table(columns, lines)}"


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> list[Path]:
    shape = command.shape_of(options)
    cases, device = find_cases(options.mechanisms, options.varlen), shape.device
    contenders = [*our_backends(device, options.backends), *baselines_on(device)]
    deadline = time.monotonic() + options.budget_s
    limits = Limits(rounds=options.rounds, rounds_s=ROUNDS_S, row_s=options.case_s, deadline=deadline)
    found, rows = AttentionBench(shape), [AttentionRow(contender, case) for case in cases for contender in contenders]
    with connected(Ranks(), device):
        checked = found.check_all(row for row in rows if row.contender.packed or not row.case.packed)
        found.measure(checked, options.tokens, limits)
        memory = found.peaks_at(options.memory, limits)
    facts = machine_facts(device, "bench_attention", arguments)
    title = f"Attention, forward and backward: {processor(facts)}, {shape}"
    tables, lines = [], {}
    for size in sorted({result.size for result in found.results}):
        table = run.results_table(COLUMNS, [result for result in found.results if result.size == size], 2)
        tables.append(f"## {human(size)} tokens\n\n{table}")
    for result in found.results:
        if result.times is not None:
            lines.setdefault(result.row.name, []).append((result.size, result.ms("fwd_bwd")))
    return found.write(
        options.out or default_out(facts, "attention"),
        facts,
        title=title,
        notes=NOTES.format(rounds=options.rounds),
        tables=[*tables, *([memory_table(memory, options.memory)] if options.memory else [])],
        plot=Plot(title=title, series=lines, x="tokens", y="milliseconds", log="xy"),
    )


def main(arguments: Sequence[str]) -> int:
    parser = command.benchmark_parser(__doc__)
    command.add_attention_options(parser)
    parser.add_argument("--varlen", type=command.names, default=BASELINE, help="cases over packed documents too")
    parser.add_argument("--backends", type=command.names, default=[], help=f"by default all that run but {REFERENCE}")
    parser.add_argument("--memory", type=command.sizes, default=[], help="also a table of peaks at these tokens")
    parser.add_argument("--case-s", type=float, help="leave out rows whose pass takes more seconds")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = command.parse(parser, arguments, DEFAULTS, rounds=run.FEWEST_ROUNDS)
    return command.print_all(lambda: bench(options, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
