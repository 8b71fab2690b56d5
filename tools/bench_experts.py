"""Measure products of rows with matrices of their experts, beside one matrix for all rows: the same FLOPs.

Writes JSON and Markdown. Each row is checked against float64 in the same run; a wrong one gets no number:
`python -m farspan.tools.bench_experts --device cpu`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from farspan.parallel.ranks import Ranks, connected
from farspan.tools import command
from farspan.tools.bench import machine
from farspan.tools.bench.experts import MULTIPLE, ExpertBench, Load, even_counts, skewed_counts
from farspan.tools.bench.run import FEWEST_ROUNDS, Limits

DEFAULTS = {
    "cpu": {"rows": 8192, "width": 1024, "inner": 512, "dtype": "float32", "rounds": 7},
    "cuda": {"rows": 65536, "width": 2048, "inner": 1024, "dtype": "bfloat16", "rounds": 20},
}
"""On a CPU: a layer of 1024 tokens, 8 of 64 experts each, as fine-grained mixtures have them (arXiv 2401.06066)."""
COUNTS = {"even": even_counts, "skewed": skewed_counts}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command.benchmark_parser(__doc__, "experts")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, help="of all experts together")
    parser.add_argument("--width", type=int)
    parser.add_argument("--inner", type=int)
    parser.add_argument("--dtype", choices=command.DTYPES)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="fewer rounds after so many seconds")
    options = command.parse_for_device(parser, arguments, DEFAULTS)
    command.require_at_least(parser, options, rounds=FEWEST_ROUNDS, experts=1, rows=1, width=1, inner=1)
    return options


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device, step = command.device_of(options.device), MULTIPLE[options.device]
    loads = [
        Load(
            name=name,
            counts=tuple(step * count for count in counts(options.experts, options.rows // step)),
            width=options.width,
            inner=options.inner,
            dtype=command.DTYPES[options.dtype],
            device=device,
        )
        for name, counts in COUNTS.items()
    ]
    facts = machine.facts(device, arguments, tool="bench_experts")
    found, limits = ExpertBench(loads), Limits(rounds=options.rounds, rounds_until=time.monotonic() + options.budget_s)
    # As in training, where a rank keeps the memory of its gradients from step to step.
    with connected(Ranks(), device):
        found.measure(found.check_all(found.rows()), [loads[0].rows], limits)
    return found.report(facts).write(options.out or machine.default_out(device, "experts"))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can fix."""
    return command.print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
