"""Measure products of rows with matrices of their experts, beside one matrix for all rows: the same FLOPs.

Writes JSON and Markdown. Each row is checked against float64 in the same run; a wrong one gets no number:
`python -m farspan.tools.bench_experts --device cpu`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import machine
from farspan.tools.bench.check import Verdict
from farspan.tools.bench.experts import (
    MULTIPLE,
    PRODUCTS,
    Contender,
    Load,
    contenders_on,
    even_counts,
    skewed_counts,
    small,
    verdict,
)
from farspan.tools.bench.files import table_line, write_files
from farspan.tools.bench.timing import DIRECTIONS, Times, time_once
from farspan.tools.bench_attention import DTYPES, device_of
from farspan.tools.command import print_all

DEFAULTS = {
    "cpu": {"rows": 8192, "width": 1024, "inner": 512, "dtype": "float32", "rounds": 7},
    "cuda": {"rows": 65536, "width": 2048, "inner": 1024, "dtype": "bfloat16", "rounds": 20},
}
"""Of a CPU: a layer of 1024 tokens, 8 of 64 experts each, as fine-grained mixtures have them (arXiv 2401.06066)."""
WARM_UPS = {"cpu": 1, "cuda": 2}
BOTH = "fwd_bwd"
COLUMNS = (
    "rows are",
    "products",
    "fwd ms",
    "bwd ms",
    "fwd+bwd ms",
    "least",
    "TFLOP/s",
    "of dense",
    "lowest",
    "highest",
)
HOW = """{experts} experts, {rows} rows in all, of width {width} with matrices of inner size {inner}, {dtype}. `skewed`:
counts in proportion to 1, 1/2, 1/3, ..., a tenth of the experts has none: {skewed}. Milliseconds are medians of
{rounds} rounds (`least`: of fwd+bwd, the shortest); in each round every row of the table ran once. `of dense`: the time
of one matrix for all rows over this one's, forward and backward, the median of the rounds' ratios, with the `lowest`
and `highest` round. Dense SwiGLU is torch's products and as many FLOPs as the experts': gate and up are computed again
in the backward pass (11 products instead of 9), which the one that keeps them does not do. Every row was checked in the
same run against float64.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """ms: median of the rounds. of_dense: time of one matrix for all rows over this one's. None where not correct."""

    products: str
    load: str
    device: str
    dtype: str
    experts: int
    rows: int
    width: int
    inner: int
    direction: str
    ms: float | None
    tflops: float | None
    of_dense: float | None
    correct: bool


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What was found of a contender under a load."""

    contender: Contender
    load: Load
    verdict: Verdict
    times: Times | None

    @property
    def key(self) -> tuple[str, str]:
        return self.load.name, self.contender.kind


def measure(loads: Sequence[Load], rounds: int, deadline: float) -> list[Row]:
    """Check all, then run all that are right in turns: 3 rounds at least, even past `deadline` of `time.monotonic`."""
    pairs = [(contender, load) for load in loads for contender in contenders_on(load.device)]
    verdicts = [verdict(contender, small(load)) for contender, load in pairs]
    able = [number for number, found in enumerate(verdicts) if found.correct]
    prepared = {n: (pairs[n][0].of(pairs[n][1]), pairs[n][1].gradient(pairs[n][0].kind)) for n in able}
    # Matrices and rows are shared by all that have such.
    shared = {(pairs[n][0].kind, pairs[n][0].dense): pairs[n][0].inputs(pairs[n][1]) for n in able}
    times = {number: Times() for number in able}
    warm_ups = WARM_UPS[loads[0].device.type]
    for turn in range(warm_ups + rounds):
        if turn >= warm_ups + 3 and time.monotonic() > deadline:
            break
        for number in able:
            run, dout = prepared[number]
            forward, backward = time_once(run, shared[pairs[number][0].kind, pairs[number][0].dense], dout)
            if turn >= warm_ups:
                times[number].fwd.append(forward)
                times[number].bwd.append(backward)
    return [Row(*pair, verdicts[number], times.get(number)) for number, pair in enumerate(pairs)]


def dense_of(rows: Sequence[Row]) -> dict[tuple[str, str], Times]:
    """Return the times of the first dense contender of each load and kind."""
    found: dict[tuple[str, str], Times] = {}
    for row in rows:
        if row.contender.dense and row.times is not None:
            found.setdefault(row.key, row.times)
    return found


def records_of(rows: Sequence[Row]) -> Iterator[Record]:
    """Yield three records for each row: forward, backward, and both."""
    dense = dense_of(rows)
    for row in rows:
        load, times = row.load, row.times
        for direction in DIRECTIONS:
            flops = 2 * load.rows * load.width * load.inner * PRODUCTS[row.contender.kind][direction]
            base = dense.get(row.key)
            yield Record(
                products=row.contender.name,
                load=load.name,
                device=load.device.type,
                dtype=str(load.dtype).removeprefix("torch."),
                experts=len(load.counts),
                rows=load.rows,
                width=load.width,
                inner=load.inner,
                direction=direction,
                ms=None if times is None else times.median(direction),
                tflops=None if times is None else flops / times.median(direction) / 1e9,
                of_dense=None if times is None or base is None else times.speedup_over(base, direction),
                correct=row.verdict.correct,
            )


def markdown(rows: Sequence[Row], facts: Mapping[str, str], rounds: int) -> str:
    """Return the report as Markdown."""
    load, skewed = rows[0].load, max((row.load for row in rows), key=lambda load: max(load.counts))
    how = HOW.format(
        experts=len(load.counts), rows=load.rows, width=load.width, inner=load.inner, rounds=rounds,
        dtype=str(load.dtype).removeprefix("torch."), skewed=" ".join(map(str, sorted(skewed.counts, reverse=True))),
    )  # fmt: skip
    lines = [f"# Products of experts, forward and backward: {facts.get('gpu') or facts['cpu']}", ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), "", how, table_line(COLUMNS)]
    lines += [table_line(["---"] * len(COLUMNS)), *table(rows), "", "## What was checked", ""]
    lines += [f"- {row.contender.name}: {row.verdict.said}" for row in rows]
    return "\n".join([*lines, ""])


def table(rows: Sequence[Row]) -> Iterator[str]:
    dense = dense_of(rows)
    both = {(r.products, r.load): r for r in records_of(rows) if r.direction == BOTH}
    for row in rows:
        name, times = [row.load.name, row.contender.name], row.times
        if times is None:
            yield table_line([*name, "not correct", *[""] * (len(COLUMNS) - 3)])
            continue
        record, base = both[row.contender.name, row.load.name], dense.get(row.key)
        cells = [*(times.median(direction) for direction in DIRECTIONS), times.least(BOTH), record.tflops]
        if base is not None:
            ratios = [theirs / mine for theirs, mine in zip(base.of(BOTH), times.of(BOTH), strict=True)]
            cells += [record.of_dense, min(ratios), max(ratios)]
        cells += [None] * (len(COLUMNS) - 2 - len(cells))
        yield table_line([*name, *("" if x is None else f"{x:.3g}" for x in cells)])


def bench(options: argparse.Namespace, command: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device = device_of(options.device)
    step = MULTIPLE[options.device]
    counts = {
        name: tuple(step * count for count in make(options.experts, options.rows // step))
        for name, make in COUNTS.items()
    }
    loads = [
        Load(name=name, counts=of, width=options.width, inner=options.inner, dtype=DTYPES[options.dtype], device=device)
        for name, of in counts.items()
    ]
    facts = machine.facts(device, command, tool="bench_experts")
    # As in training, where a rank keeps the memory of its gradients from step to step.
    with connected(Ranks(), device):
        rows = measure(loads, options.rounds, time.monotonic() + options.budget_s)
    for line in table(rows):
        print(line, flush=True)
    out = options.out or machine.default_out(device, "experts")
    taken = max((len(row.times.fwd) for row in rows if row.times is not None), default=0)
    texts = {
        f"{out.name}.json": json.dumps([asdict(record) for record in records_of(rows)], indent=1) + "\n",
        f"{out.name}_machine.json": json.dumps(facts, indent=1) + "\n",
        f"{out.name}.md": markdown(rows, facts, taken),
    }
    return write_files(out.parent, texts)


COUNTS = {"even": even_counts, "skewed": skewed_counts}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, those not given as is usual for the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, help="of all experts together")
    parser.add_argument("--width", type=int)
    parser.add_argument("--inner", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--rounds", type=int, help="timings of each row, at least 3")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="fewer rounds after so many seconds")
    parser.add_argument("--out", type=Path, help="path without suffix; docs/benchmarks/DATE_DEVICE_experts")
    options = parser.parse_args(arguments)
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for name, least in (("rounds", 3), ("experts", 1), ("rows", 1), ("width", 1), ("inner", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can mend."""
    return print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
