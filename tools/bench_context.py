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
from farspan.tools import command
from farspan.tools.bench import machine
from farspan.tools.bench.baselines.context_parallel import context_baselines
from farspan.tools.bench.case import BASELINE, Shape, find_cases, known
from farspan.tools.bench.check import first_line
from farspan.tools.bench.context import OVERLAPPED, ContextBench, cores
from farspan.tools.bench.context_contenders import SINGLE, ContextContender, StrategyContender
from farspan.tools.bench.report import Table
from farspan.tools.bench.run import FEWEST_ROUNDS, Limits
from farspan.tools.rank_pool import RankError

CPU_ONLY = "only transfers of CPU tensors can be delayed."
DEFAULTS = {
    "mechanisms": "dense,window_1024,moba_512x8,mosa_16,lightning", "tokens": "8K,16K", "heads": "8:2", "head_dim": 64,
    "dtype": "float32",
}  # fmt: skip


def degrees(text: str) -> list[int]:
    """Return the numbers of ranks in a list such as 2,4."""
    found = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) and int(part) > 1 for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of ranks, at least 2, such as 2,4")
    return [int(part) for part in found]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command.benchmark_parser(__doc__, "context", rounds=3)
    command.add_attention_options(parser)
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--strategies", type=command.names, default=[], help="and baselines; all by default")
    parser.add_argument("--layouts", type=command.names, default="contiguous,zigzag")
    parser.add_argument("--degrees", type=degrees, default="2,4", help="numbers of ranks, such as 2,4")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="complete every transfer so long after its start")
    options = parser.parse_args(arguments)
    command.require_at_least(parser, options, rounds=FEWEST_ROUNDS, delay_ms=0)
    return options


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device, dim = command.device_of(options.device), options.head_dim
    _check_ranks(options)
    # Dense attention comes first among the cases in any event; here it is measured only by request.
    cases = [c for c in find_cases(options.mechanisms, []) if c.name != BASELINE or BASELINE in options.mechanisms]
    contenders = chosen_contenders(options.strategies)
    layouts = [known(name, "layout", list(LAYOUTS)) for name in options.layouts]
    dtype = command.DTYPES[options.dtype]
    shape = Shape(heads=options.heads, head_dim=dim, value_dim=dim, dtype=dtype, device=device)
    with connected(Ranks(), device), ContextBench(shape, options.delay_ms / 1e3) as found:
        for case in cases:
            if reason := case.mechanism.unsupported_reason(options.heads, max(options.tokens)):
                found.leave_out(case.name, reason)
                continue
            checked = found.check_all(found.rows(case, contenders, layouts, options.degrees))
            found.measure(checked, options.tokens, Limits(rounds=options.rounds))
        overlap = _overlap(found, options)
    facts = machine.facts(device, arguments, tool="bench_context") | {"threads": "1 per rank", "cores": str(cores())}
    facts |= {"deepspeed": machine.version("deepspeed")}
    return found.report(facts, overlap, options.rounds).write(options.out or machine.default_out(device, "context"))


def _check_ranks(options: argparse.Namespace) -> None:
    """Raise ConfigError where there are fewer GPUs than ranks, or transfers of GPUs should be delayed."""
    most = max(options.degrees)
    if options.device == "cuda" and torch.cuda.device_count() < most:
        raise ConfigError(
            f"--degrees {most} needs as many GPUs with --device cuda, and there are {torch.cuda.device_count()}: "
            "name fewer ranks."
        )
    if options.device == "cuda" and options.delay_ms:
        raise ConfigError(f"--delay-ms {options.delay_ms:g} does not work with --device cuda: {CPU_ONLY}")


def chosen_contenders(chosen: Sequence[str]) -> list[ContextContender]:
    """Return strategies and baselines, those `chosen` or all, without `single`, which is always measured.

    Raises ConfigError for an unknown name.
    """
    able: dict[str, ContextContender] = {
        name: StrategyContender(name, strategy) for name, strategy in STRATEGIES.load().items() if name != SINGLE
    }
    able |= context_baselines()
    return [able[known(name, "strategy", list(able))] for name in chosen or able if name != SINGLE]


def _overlap(found: ContextBench, options: argparse.Namespace) -> list[Table]:
    """Measure a ring with delayed transfers: at each number of ranks its last correct row of the first mechanism.

    Only where every rank has a core: of ranks that share one, some compute while others wait for transfers.
    """
    rings = [row for row, verdict in found.checked.values() if row.contender.name == OVERLAPPED and verdict.correct]
    rows = {row.degree: row for row in rings if row.case == rings[0].case}
    tables, tokens = [], min(options.tokens)
    for degree, row in rows.items():
        if options.device == "cuda" or degree > cores():
            reason = f"it needs a core for each rank, and there are {cores()}."
            found.leave_out(f"overlap, {degree} ranks", CPU_ONLY if options.device == "cuda" else reason)
            continue
        try:
            tables.append(found.overlap(row, tokens, options.rounds))
        except RankError as error:
            found.leave_out(f"overlap, {degree} ranks", first_line(error))
    return tables


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can fix."""
    return command.print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
