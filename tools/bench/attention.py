"""The benchmark of attention: every mechanism by every backend of a device, beside the baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from farspan.kernels.cuda.packages import FlashAttn2
from farspan.kernels.mechanisms.dense import Dense
from farspan.tools.bench.baselines.flash_packages import installed_flash_attn
from farspan.tools.bench.baselines.flex import Flex
from farspan.tools.bench.baselines.public_moba import PublicMoBA
from farspan.tools.bench.case import BASELINE, Case, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import SLACK, Checker, Verdict
from farspan.tools.bench.contenders import Contender, Sdpa
from farspan.tools.bench.memory import WARM_UP_TOKENS, Peaks, peaks_of_pass, reports_memory
from farspan.tools.bench.on_rank import WARM_UPS, Worker, worker_pool
from farspan.tools.bench.plot import Plot
from farspan.tools.bench.report import Report, Table, mib
from farspan.tools.bench.run import Bench, Limits, Record, Result
from farspan.tools.bench.timing import DIRECTIONS, Pass, warm_pass
from farspan.tools.command import human
from farspan.tools.rank_pool import RankError

BOTH = "fwd_bwd"
DENSE = Case(name=BASELINE, mechanism=Dense())
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
    return [
        Sdpa("torch_sdpa_flash", "FLASH_ATTENTION"),
        Sdpa("torch_sdpa_cudnn", "CUDNN_ATTENTION"),
        Flex(),
        *installed_flash_attn(),
        *([] if FlashAttn2.find() is None else [PublicMoBA()]),
    ]


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
        contender, slack = row.contender, SLACK if row.contender.is_baseline else 1.0
        return self._checker.check(
            contender.name, row.case, lambda check: check.run_of(contender), packed=contender.packed, slack=slack
        )

    def refuse(self, row: AttentionRow, verdict: Verdict) -> None:
        # Each baseline refuses most mechanisms.
        if not row.contender.is_baseline:
            super().refuse(row, verdict)

    def start(self, row: AttentionRow, size: int) -> Pass:
        mechanism, shape = row.case.mechanism, self.shape
        inputs = self.shared(mechanism.routing_width, lambda: inputs_of(mechanism, size, shape))
        dout = self.shared("dout", lambda: gradient_of_out(size, shape))
        attention = row.contender.plan(mechanism, row.case.rows(size), shape)
        return warm_pass(attention, inputs, dout, WARM_UPS[shape.device.type])

    def work(self, row: AttentionRow, size: int) -> float:
        return row.case.unmasked_pairs(size)

    def is_baseline(self, other: AttentionRow, row: AttentionRow) -> bool:
        return other.case.name == BASELINE and not other.contender.is_baseline

    def needs(self, row: AttentionRow, size: int) -> Peaks | None:
        """Return the peaks of a pass; None where this system does not report memory.

        CUDA: by torch's allocator. CPU: by the system's count of resident pages, in a process of its own (Linux only).
        """
        if self.shape.device.type == "cuda":
            return _peaks(row, size, self.shape)
        if not reports_memory(self.shape.device):
            return None
        try:
            with worker_pool(1, torch.get_num_threads(), "cpu") as pool:
                return pool.run(peaks_in_fresh_process, row, size, self.shape)[0]
        except RankError:
            return None

    def peaks_at(self, sizes: Sequence[int], limits: Limits) -> dict[str, list[int]]:
        """Return the peak at each size by row, measured only where the results do not have it.

        A row ends where the time budget does.
        """
        known = {(result.row.name, result.size): result.needs for result in self.results}
        found: dict[str, list[int]] = {}
        for name, (row, verdict) in self.checked.items():
            if not verdict.correct:
                continue
            found[name] = []
            for size in sizes:
                peaks = known.get((name, size))
                if peaks is None and not limits.reason_to_skip(None):
                    peaks = self.needs(row, size)
                if peaks is None:
                    break
                found[name].append(peaks[BOTH])
        return found

    def records(self, result: Result[AttentionRow]) -> list[Record]:
        row, times, shape = result.row, result.times, self.shape
        pairs = row.case.unmasked_pairs(result.size)
        ideal = DENSE.unmasked_pairs(result.size) / max(pairs, 1)
        records = []
        for direction in DIRECTIONS:
            ms, speedup = None if times is None else times.median(direction), result.speedup(direction)
            records.append(
                {
                    "mechanism": row.case.name,
                    "backend": row.contender.name,
                    "device": shape.device.type,
                    "dtype": str(shape.dtype).removeprefix("torch."),
                    "tokens": result.size,
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

    def report(
        self, machine: Mapping[str, str], rounds: int, memory: Mapping[str, Sequence[int]], sizes: Sequence[int]
    ) -> Report:
        """Return the report; memory: peaks by row at each of `sizes`."""
        title = f"Attention, forward and backward: {machine.get('gpu') or machine['cpu']}, {self.shape}"
        tables = [
            Table.of_results(COLUMNS, [r for r in self.results if r.size == size], 2, f"{human(size)} tokens")
            for size in dict.fromkeys(result.size for result in self.results)
        ]
        tables += [memory_table(memory, sizes)] if memory else []
        lines: dict[str, list[tuple[float, float]]] = {}
        for result in self.results:
            if result.times is not None:
                lines.setdefault(result.row.name, []).append((result.size, result.times.median(BOTH)))
        plot = Plot(title=title, series=lines, x="tokens", y="milliseconds", log=True)
        return self.report_with(machine, title=title, notes=NOTES.format(rounds=rounds), tables=tables, plot=plot)


def _both(name: str) -> Callable[[Result[AttentionRow]], Any]:
    return lambda result: result.records[-1][name]


COLUMNS = {
    "mechanism": _both("mechanism"),
    "backend": _both("backend"),
    "forward ms": lambda result: result.times.median("fwd"),
    "backward ms": lambda result: result.times.median("bwd"),
    "both ms": _both("ms"),
    "shortest ms": lambda result: result.times.shortest(BOTH),
    "useful TFLOP/s": _both("useful_tflops"),
    "speed-up over dense": _both("speedup_over_dense"),
    "ideal speed-up": _both("ideal_speedup"),
    "share of the ideal": _both("fraction_of_ideal"),
    "peak MiB": lambda result: mib(_both("peak_bytes")(result)),
}


def useful_flops(pairs: int, shape: Shape, direction: str) -> float:
    """Return the FLOPs of products over unmasked pairs: 2 per pair, query head and element; 2 products forward, 5 back.

    Where D differs from Dv, their mean stands for both.
    """
    return MATMULS[direction] * pairs * shape.heads.query * (shape.head_dim + shape.value_dim)


def memory_table(memory: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> Table:
    """Return the peaks, and the ratio of the last to the first beside that of the tokens."""
    lines = []
    for name, peaks in memory.items():
        growth = f"{peaks[-1] / peaks[0]:.1f}" if len(peaks) == len(sizes) and peaks[0] > 0 else ""
        lines.append([name, *map(mib, peaks), *[""] * (len(sizes) - len(peaks)), growth])
    growth = f"growth (tokens: {sizes[-1] / sizes[0]:g})"
    columns = ["", *(f"{human(size)} MiB" for size in sizes), growth]
    return Table(heading="Peak memory, forward and backward", columns=columns, lines=lines)


def peaks_in_fresh_process(worker: Worker, row: AttentionRow, tokens: int, shape: Shape) -> Peaks:
    _peaks(row, WARM_UP_TOKENS, shape)  # loads libraries and their workspaces
    return _peaks(row, tokens, shape)


def _peaks(row: AttentionRow, tokens: int, shape: Shape) -> Peaks:
    attention = row.contender.plan(row.case.mechanism, row.case.rows(tokens), shape)
    return peaks_of_pass(attention, inputs_of(row.case.mechanism, tokens, shape), gradient_of_out(tokens, shape))
