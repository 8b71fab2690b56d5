"""Measure context parallelism: strategies, layouts and mechanisms side by side on one sequence, beside one rank.

Writes JSON, Markdown and a plot. Each row is checked against one process in float64 in the same run; a wrong one gets
no number: `python -m farspan.tools.bench_context --tokens 8K,16K --degrees 2,4`.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import final

import torch

from farspan.errors import ConfigError
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS
from farspan.parallel.ranks import Ranks, connected
from farspan.tools import command
from farspan.tools.bench import on_rank
from farspan.tools.bench.baselines.context_parallel import context_baselines
from farspan.tools.bench.case import BASELINE, Case, Shape, find_cases, known
from farspan.tools.bench.check import Check, Checker, Run, Verdict, first_line
from farspan.tools.bench.on_rank import ContextContender, ContextRow, StrategyContender, worker_pool
from farspan.tools.bench.report import Plot, Record, default_out, machine_facts, markdown_table, mib, processor
from farspan.tools.bench.run import FEWEST_ROUNDS, Bench, Columns, Limits, Pass, Result, Times, results_table
from farspan.tools.command import human
from farspan.tools.rank_pool import RankError, RankPool
from farspan.versions import version

DEFAULTS = {
    "mechanisms": "dense,window_1024,moba_512x8,mosa_16,lightning", "tokens": "8K,16K", "heads": "8:2", "head_dim": 64,
    "dtype": "float32", "rounds": 3,
}  # fmt: skip
SINGLE = "single"
OVERLAPPED = "ring"
"""The strategy whose transfers are delayed, to show that they overlap with computing."""
DELAYS = (0.0, 0.5, 1.0, 2.0)
"""Delays of transfers over the time of a step's computing."""
NO_DELAY = (0.0, 0.0)
NOTES = """Ranks are processes of one thread each, over {backend}. Milliseconds are medians of {rounds} rounds, of the
slowest rank; forward and backward each begin when all ranks are ready, and every row of a table runs once per round.
`speed over one rank` compares tokens/s with one process that has as many threads as there are ranks: the median of the
rounds' ratios. Bytes are those of the rank that sends most, forward and backward, as its channel counted them and as
the strategy's formula states them; a * marks rows where the two differ on some rank. `balance` is the number of pairs
of queries and keys of the busiest rank over the mean; where content decides, of the pairs that may be unmasked. The
peak, of the rank with most, is above its inputs. Every row was checked in the same run against one process in float64,
at the sizes listed below: out and gradients of all ranks put together. A row without numbers failed: its numbers would
mean nothing.
"""
OVERLAP = """## Overlap, {ranks} ranks

Each transfer of {strategy} ({layout}, {mechanism}, {tokens} tokens) to a neighbor completes no earlier than a delay
after its sender started it; senders do not wait. A step is a rank's computing between two hops: the time without delay
over the number of ranks. `overlapped` is the time if transfers overlap with computing, the longer of both; `exposed`
is the time if they do not, their sum. Backward, the last gradient arrives after all computing, in both.

{table}"""


@final
class ContextBench(Bench[ContextRow]):
    """Rows that run on pools of ranks, which `pools` stops."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.pools = shape, ExitStack()
        self._checker = Checker(shape)
        self._running: dict[tuple[int, int], RankPool] = {}

    def pool(self, row: ContextRow) -> RankPool:
        """Return the pool that a row runs on, started at its first call."""
        size = row.degree, row.threads
        if size not in self._running:
            self._running[size] = self.pools.enter_context(worker_pool(*size, self.shape.device.type))
        return self._running[size]

    def rows(
        self, case: Case, contenders: Sequence[ContextContender], layouts: Sequence[str], degrees: Sequence[int]
    ) -> list[ContextRow]:
        """Return the rows of a case that their contenders support, and leave out the others; first those of one rank.

        On CPUs also one rank with as many threads as there are ranks in others.
        """
        single = StrategyContender(SINGLE, STRATEGIES.get(SINGLE))
        rows = [
            ContextRow(contender=single, case=case, layout="contiguous", degree=1, threads=threads)
            for threads in dict.fromkeys((1, *(degrees if self.shape.device.type == "cpu" else ())))
        ]
        for degree, contender, layout in product(degrees, contenders, layouts):
            row = ContextRow(contender=contender, case=case, layout=layout, degree=degree)
            if reason := contender.unsupported_reason(case.mechanism, layout, self.shape.heads, degree):
                self.left_out.setdefault(row.name, reason)
            else:
                rows.append(row)
        return rows

    def check(self, row: ContextRow) -> Verdict:
        verdict = self._checker.check(row.contender, row.setting, row.case, partial(self._plan, row))
        # A baseline that dies is left out; a strategy of ours that dies is wrong.
        return replace(verdict, refused=True) if verdict.crashed and row.contender.is_baseline else verdict

    def _plan(self, row: ContextRow, check: Check) -> Run:
        if reason := row.contender.unsupported_reason(check.mechanism, row.layout, check.shape.heads, row.degree):
            raise ConfigError(reason)
        return partial(self._run, row, check)

    def _run(self, row: ContextRow, check: Check) -> list[torch.Tensor]:
        ranks = self.pool(row).run(on_rank.check, row, check)
        shards = row.shards(check.mechanism, check.rows)
        return [shards.unshard(torch.stack(parts)).to(check.shape.device) for parts in zip(*ranks, strict=True)]

    def start(self, row: ContextRow, size: int) -> Pass:
        return partial(self.time, row, size, NO_DELAY)

    def time(self, row: ContextRow, size: int, delays_s: tuple[float, float]) -> tuple[float, float]:
        """Time a pass: it takes as long as its slowest rank."""
        forward, backward = zip(*self.pool(row).run(on_rank.time_pass, row, size, self.shape, delays_s), strict=True)
        return max(forward), max(backward)

    def release(self) -> None:
        for pool in self._running.values():
            pool.run(on_rank.forget)

    def is_baseline(self, other: ContextRow, row: ContextRow) -> bool:
        return other.contender.name == SINGLE and other.threads == row.degree > 1

    def needs(self, row: ContextRow, size: int) -> Record:
        """Measure memory and bytes in fresh processes; the numbers of the rank with most."""
        try:
            with worker_pool(row.degree, row.threads, self.shape.device.type) as pool:
                ranks = pool.run(on_rank.measure, row, size, self.shape)
        except RankError as error:
            self.left_out.setdefault(f"memory and bytes of {row.name}, {human(size)} tokens", first_line(error))
            return {}
        sent, formula, peak, work = ([needs[of] for needs in ranks] for of in ("sent", "formula", "peak", "work"))
        return {
            "bytes_sent": None if None in sent else max(sent),
            "bytes_formula": None if None in formula else max(formula),
            "balance": max(work) * len(work) / sum(work) if sum(work) else None,
            "peak_bytes": None if None in peak else max(peak),
            "differs": None not in formula and sent != formula,
        }

    def records(self, result: Result[ContextRow]) -> list[Record]:
        row, needs, ms = result.row, result.needs or {}, result.ms("fwd_bwd")
        record: Record = {
            "strategy": row.strategy,
            "layout": row.layout,
            "mechanism": row.case.name,
            "degree": row.degree,
            "tokens": result.size,
            "tokens_per_s": None if ms is None else result.size / (ms / 1e3),
        }
        return [record | {name: needs.get(name) for name in ("bytes_sent", "bytes_formula", "balance", "peak_bytes")}]


COLUMNS: Columns = {
    "strategy": lambda result: result.row.strategy,
    "layout": lambda result: result.row.layout,
    "ranks": lambda result: result.row.degree,
    "tokens/s": lambda result: result.records[0]["tokens_per_s"],
    "forward ms": lambda result: result.ms("fwd"),
    "backward ms": lambda result: result.ms("bwd"),
    "speed over one rank": lambda result: result.speedup("fwd_bwd"),
    "MiB sent": lambda result: f"{mib(result.needs.get('bytes_sent'))}{'*' if result.needs.get('differs') else ''}",
    "MiB by formula": lambda result: mib(result.records[0]["bytes_formula"]),
    "balance": lambda result: result.records[0]["balance"],
    "peak MiB": lambda result: mib(result.records[0]["peak_bytes"]),
}
OVERLAP_COLUMNS = (
    "pass", "step ms", "delay ms", "measured ms", "overlapped ms", "exposed ms", "measured over overlapped",
)  # fmt: skip


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def predicted(degree: int, direction: str, step: float, delay: float) -> tuple[float, float]:
    """Return how long a ring's pass takes if transfers overlap with computing, and if they do not.

    `degree` steps with a hop between each two; backward the gradient of the last chunk has a hop to go when all is
    computed, the others go together with chunks.
    """
    last_hop = delay if direction == "bwd" else 0.0
    return step + (degree - 1) * max(step, delay) + last_hop, degree * step + (degree - 1) * delay + last_hop


def overlap(found: ContextBench, tokens: int, rounds: int) -> Iterator[str]:
    """Time a ring with delayed transfers: at each number of ranks its last correct row of the first mechanism.

    Only where every rank has a core: of ranks that share one, some compute while others wait for transfers.
    """
    rings = [row for row, verdict in found.checked.values() if row.contender.name == OVERLAPPED and verdict.correct]
    for degree, row in {row.degree: row for row in rings if row.case == rings[0].case}.items():
        if found.shape.device.type == "cuda":
            found.left_out[f"overlap, {degree} ranks"] = "only transfers of CPU tensors can be delayed."
        elif degree > cores():
            found.left_out[f"overlap, {degree} ranks"] = f"it needs a core for each rank, and there are {cores()}."
        else:
            try:
                yield overlap_table(found, row, tokens, rounds)
            except RankError as error:
                found.left_out[f"overlap, {degree} ranks"] = first_line(error)


def overlap_table(found: ContextBench, row: ContextRow, size: int, rounds: int) -> str:
    """Time a ring's passes with each of the delays, in turn; return the times beside those that they should take.

    Raises RankError if a rank fails.
    """
    times, degree, lines = [Times() for _ in DELAYS], row.degree, []
    calm = Times(found.time(row, size, NO_DELAY) for _ in range(rounds))
    steps = {direction: calm.median(direction) / degree for direction in ("fwd", "bwd")}
    for _ in range(rounds):
        for delay, of_delay in zip(DELAYS, times, strict=True):
            of_delay.append(found.time(row, size, (delay * steps["fwd"] / 1e3, delay * steps["bwd"] / 1e3)))
    found.release()
    for direction, calm_step in steps.items():
        step = times[0].median(direction) / degree
        for delay, of_delay in zip(DELAYS, times, strict=True):
            ms, delay_ms = of_delay.median(direction), delay * calm_step
            overlapped, exposed = predicted(degree, direction, step, delay_ms)
            lines.append([direction, step, delay_ms, ms, overlapped, exposed, ms / overlapped])
    return OVERLAP.format(
        ranks=degree, strategy=row.strategy, layout=row.layout, mechanism=row.case.name, tokens=human(size),
        table=markdown_table(OVERLAP_COLUMNS, lines),
    )  # fmt: skip


def chosen_contenders(chosen: Sequence[str]) -> list[ContextContender]:
    """Return strategies and baselines, those `chosen` or all, without `single`, which is always measured.

    Raises ConfigError for an unknown name.
    """
    able: dict[str, ContextContender] = {
        name: StrategyContender(name, strategy) for name, strategy in STRATEGIES.load().items() if name != SINGLE
    }
    able |= context_baselines()
    return [able[known(name, "strategy", list(able))] for name in chosen or able if name != SINGLE]


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> list[Path]:
    shape, most = command.shape_of(options), max(options.degrees)
    if options.device == "cuda" and torch.cuda.device_count() < most:
        raise ConfigError(
            f"--degrees {most} needs as many GPUs with --device cuda, and there are {torch.cuda.device_count()}: "
            "name fewer ranks."
        )
    # Dense attention comes first among the cases in any event; here it is measured only by request.
    cases = [c for c in find_cases(options.mechanisms, []) if c.name != BASELINE or BASELINE in options.mechanisms]
    contenders = chosen_contenders(options.strategies)
    layouts = [known(name, "layout", list(LAYOUTS)) for name in options.layouts]
    found = ContextBench(shape)
    with connected(Ranks(), shape.device), found.pools:
        for case in cases:
            if reason := case.mechanism.unsupported_reason(options.heads, max(options.tokens)):
                found.left_out[case.name] = reason
                continue
            checked = found.check_all(found.rows(case, contenders, layouts, options.degrees))
            found.measure(checked, options.tokens, Limits(rounds=options.rounds))
        overlaps = list(overlap(found, min(options.tokens), options.rounds))
    facts = machine_facts(shape.device, "bench_context", arguments) | {"threads": "1 per rank", "cores": str(cores())}
    facts |= {"deepspeed": version("deepspeed")}
    title = f"Context parallelism: {processor(facts)}, {shape}"
    groups: dict[tuple[str, int], list[Result[ContextRow]]] = {}
    for result in found.results:
        groups.setdefault((result.row.case.name, result.size), []).append(result)
    tables = [
        f"## {case}, {human(size)} tokens\n\n{results_table(COLUMNS, group, 3)}"
        for (case, size), group in groups.items()
    ]
    return found.write(
        options.out or default_out(facts, "context"),
        facts,
        title=title,
        notes=NOTES.format(rounds=options.rounds, backend="NCCL" if options.device == "cuda" else "gloo"),
        tables=[*tables, *overlaps],
        plot=plot(title, found.results),
    )


def plot(title: str, results: Sequence[Result[ContextRow]]) -> Plot:
    """Return speed over ranks, of the first case, dense if it was measured, and its longest sequence."""
    case, size = max(
        ((r.row.case.name, r.size) for r in results if r.row.case == results[0].row.case), default=("nothing", 0)
    )
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        row = result.row
        if (row.case.name, result.size) == (case, size) and result.times is not None:
            name = "one rank, threads" if row.contender.name == SINGLE else f"{row.strategy}, {row.layout}"
            lines.setdefault(name, []).append((row.degree * row.threads, result.records[0]["tokens_per_s"]))
    return Plot(title=f"{title}: {case}, {human(size)} tokens", series=lines, x="ranks", y="tokens/s", log="xy")


def main(arguments: Sequence[str]) -> int:
    parser = command.benchmark_parser(__doc__)
    command.add_attention_options(parser)
    parser.add_argument("--strategies", type=command.names, default=[], help="and baselines; all by default")
    parser.add_argument("--layouts", type=command.names, default="contiguous,zigzag")
    parser.add_argument("--degrees", type=command.sizes, default="2,4", help="numbers of ranks, such as 2,4")
    options = command.parse(parser, arguments, dict.fromkeys(("cpu", "cuda"), DEFAULTS), rounds=FEWEST_ROUNDS)
    if min(options.degrees) < 2:
        parser.error("--degrees must be numbers of ranks, at least 2, such as 2,4")
    return command.print_all(lambda: bench(options, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
