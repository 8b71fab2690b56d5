"""Measure context parallelism: strategies, layouts and mechanisms side by side on one sequence, beside one rank.

Writes JSON, Markdown and a plot. Each row is checked against one process in float64 in the same run; a wrong one gets
no number: `python -m farspan.tools.bench_context --tokens 8K,16K --degrees 2,4`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from farspan.errors import ConfigError
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import LAYOUTS
from farspan.parallel.ranks import Ranks, connected
from farspan.registry import nearest_name_hint
from farspan.tools.bench import context_report as report
from farspan.tools.bench import machine
from farspan.tools.bench.baselines.context_parallel import rivals
from farspan.tools.bench.case import BASELINE, Case, Shape, find_cases
from farspan.tools.bench.check import Verdict
from farspan.tools.bench.context import TRAVELS, Judge, Result, cores, measure_all, measure_overlap, rate
from farspan.tools.bench.context_contenders import SINGLE, Entrant, Row, Under, rows_of
from farspan.tools.bench.plot import human
from farspan.tools.bench.run import LeftOut
from farspan.tools.bench_attention import DTYPES, device_of, heads, names, sizes
from farspan.tools.command import print_all
from farspan.tools.rank_pool import Pools, RankError

LATE_ON_CPU = "transfers of CPU tensors alone can be delayed."
MECHANISMS = "dense,window_1024,moba_512x8,mosa_16,lightning"


def degrees(text: str) -> list[int]:
    """Return the numbers of ranks in a list such as 2,4."""
    found = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) and int(part) > 1 for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of ranks, at least 2, such as 2,4")
    return [int(part) for part in found]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--strategies", type=names, default=[], help="strategies and rivals; all if not given")
    parser.add_argument("--layouts", type=names, default=["contiguous", "zigzag"])
    parser.add_argument("--mechanisms", type=names, default=names(MECHANISMS), help="mechanisms, or rows of them")
    parser.add_argument("--degrees", type=degrees, default=[2, 4], help="numbers of ranks, such as 2,4")
    parser.add_argument("--tokens", type=sizes, default=sizes("8K,16K"), help="such as 8K,16K,1M")
    parser.add_argument("--heads", type=heads, default=heads("8:2"), help="query heads:KV heads, such as 32:8")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each row, at least 3")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="complete every transfer so long after its start")
    parser.add_argument("--out", type=Path, help="path without suffix; docs/benchmarks/DATE_DEVICE_context")
    options = parser.parse_args(arguments)
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds} must be at least 3: a median of fewer is none")
    if options.delay_ms < 0:
        parser.error(f"--delay-ms {options.delay_ms:g} must be at least 0")
    return options


def bench(options: argparse.Namespace, command: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device = device_of(options.device)
    _check_ranks(options)
    left_out = LeftOut()
    cases, entrants = chosen_cases(options.mechanisms), chosen_entrants(options.strategies)
    layouts = [_known(name, "layout", list(LAYOUTS)) for name in options.layouts]
    shape = Shape(
        heads=options.heads,
        head_dim=options.head_dim,
        value_dim=options.head_dim,
        dtype=DTYPES[options.dtype],
        device=device,
    )
    _explain_absence(entrants, cases, layouts, options, left_out)
    if options.delay_ms:
        entrants = [entrant for entrant in entrants if not entrant.is_rival]
    judged: list[tuple[Row, Verdict]] = []
    results: list[Result] = []
    with connected(Ranks(), device), Pools(options.device) as pools:
        judge = Judge(pools, shape, left_out)
        for case in cases:
            if reason := case.mechanism.unsupported_reason(options.heads, max(options.tokens)):
                left_out.add(case.name, reason)
                continue
            rows = judge.judge_all(rows_of(case, entrants, layouts, options.degrees, shape))
            judged += rows
            _say_verdicts(rows)
            for tokens in sorted(options.tokens):
                found = measure_all(rows, tokens, shape, options.rounds, options.delay_ms / 1e3, pools, left_out)
                _say_rates(found)
                results += found
        overlap = _overlap(judged, options, shape, pools, left_out)
    found = report.Report(
        machine=_facts(device, command),
        shape=f"{options.heads.query}:{options.heads.kv} heads of {options.head_dim}, {options.dtype}",
        judged=judged,
        results=results,
        overlap=overlap,
        left_out=left_out,
        rounds=options.rounds,
        late_ms=options.delay_ms,
    )
    return report.write(found, options.out or machine.default_out(device, "context"))


def _check_ranks(options: argparse.Namespace) -> None:
    """Raise ConfigError where there are fewer GPUs than ranks, or transfers of GPUs should be late."""
    most = max(options.degrees)
    if options.device == "cuda" and torch.cuda.device_count() < most:
        raise ConfigError(
            f"--degrees {most} needs as many GPUs with --device cuda, and there are {torch.cuda.device_count()}: "
            "name fewer ranks."
        )
    if options.device == "cuda" and options.delay_ms:
        raise ConfigError(f"--delay-ms {options.delay_ms:g} cannot be had with --device cuda: {LATE_ON_CPU}")


def chosen_cases(chosen: Sequence[str]) -> list[Case]:
    """Return the rows of mechanisms that were asked for; raises ConfigError for an unknown name."""
    return [case for case in find_cases(chosen, []) if case.name != BASELINE or BASELINE in chosen]


def chosen_entrants(chosen: Sequence[str]) -> list[Entrant]:
    """Return strategies and rivals, those `chosen` or all; raises ConfigError for an unknown name.

    Without `single`, which is measured whatever is chosen.
    """
    able: dict[str, Entrant] = {
        name: Under(name, strategy) for name, strategy in STRATEGIES.load().items() if name != SINGLE
    }
    able |= rivals()
    return [able[_known(name, "strategy", list(able))] for name in chosen or able if name != SINGLE]


def _known(name: str, kind: str, able: list[str]) -> str:
    if name not in able:
        hint = nearest_name_hint(name, able)
        raise ConfigError(f"{kind} {name!r} does not exist; choose from {', '.join(able)}.{hint}")
    return name


def _explain_absence(
    entrants: Sequence[Entrant],
    cases: Sequence[Case],
    layouts: Sequence[str],
    options: argparse.Namespace,
    left_out: LeftOut,
) -> None:
    """Say why what was asked for by name, and why a rival, has no row at a number of ranks."""
    for entrant in entrants:
        if entrant.is_rival and options.delay_ms:
            left_out.add(entrant.name, "its transfers cannot be delayed from outside.")
        elif entrant.is_rival or entrant.name in options.strategies:
            for degree in options.degrees:
                refusals = [
                    entrant.unsupported_reason(case.mechanism, layout, options.heads, degree)
                    for case in cases
                    for layout in layouts
                ]
                if refusals and None not in refusals:
                    left_out.add(f"{entrant.name}, {degree} ranks", str(refusals[0]))


def _overlap(
    judged: Sequence[tuple[Row, Verdict]],
    options: argparse.Namespace,
    shape: Shape,
    pools: Pools,
    left_out: LeftOut,
) -> list[report.OverlapRun]:
    """Return a ring's times with late transfers: at each number of ranks its last correct row of the first mechanism.

    Only where every rank has a core: of ranks that share one, some compute while others wait for transfers.
    """
    rings = [row for row, verdict in judged if row.entrant.name == TRAVELS and verdict.correct]
    rows = {row.degree: row for row in rings if row.case == rings[0].case}
    runs, tokens = [], min(options.tokens)
    for degree, row in rows.items():
        if options.device == "cuda" or degree > cores():
            reason = f"it needs a core for each rank, and there are {cores()}."
            left_out.add(f"overlap, {degree} ranks", LATE_ON_CPU if options.device == "cuda" else reason)
            continue
        try:
            found = measure_overlap(row, tokens, shape, options.rounds, pools)
        except RankError as error:
            left_out.add(f"overlap, {degree} ranks", str(error))
            continue
        runs.append(report.OverlapRun(row=row, tokens=tokens, found=found))
    return runs


def _facts(device: torch.device, command: Sequence[str]) -> dict[str, str]:
    """Return the machine and the software; ranks have one thread each."""
    found = machine.facts(device, command, tool="bench_context")
    return found | {"threads": "1 per rank", "cores": str(cores()), "deepspeed": machine.version("deepspeed")}


def _say_verdicts(judged: Sequence[tuple[Row, Verdict]]) -> None:
    for row, verdict in judged:
        print(f"{row.name}: {'correct' if verdict.correct else 'NOT CORRECT: ' + verdict.said}", flush=True)


def _say_rates(results: Sequence[Result]) -> None:
    for result in results:
        if result.times is not None:
            print(
                f"{human(result.tokens):>6} tokens  {result.row.name:<60}{rate(result.tokens, result.times):12,.0f}/s",
                flush=True,
            )


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can mend."""
    return print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
