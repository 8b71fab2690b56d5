"""Measure attention: every mechanism of the registry by every backend of a device, beside what torch offers.

Writes JSON, Markdown and a plot. Each row is checked against float64 in the same run; a wrong one gets no number:
`python -m farspan.tools.bench_attention --tokens 8K,16K,32K`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from farspan.parallel.ranks import Ranks, connected
from farspan.tools import command
from farspan.tools.bench import machine
from farspan.tools.bench.attention import AttentionBench, AttentionRow, baselines_on
from farspan.tools.bench.case import BASELINE, Shape, find_cases
from farspan.tools.bench.contenders import REFERENCE, our_backends
from farspan.tools.bench.run import FEWEST_ROUNDS, Limits

CPU = {"tokens": "8K,16K,32K", "heads": "8:2", "head_dim": 64, "dtype": "float32", "rounds": 3, "case_s": 120.0}
CUDA = {"tokens": "8K,16K,32K,64K,128K,512K", "heads": "32:8", "head_dim": 128, "dtype": "bfloat16", "rounds": 20}
DEFAULTS = {"cpu": CPU, "cuda": CUDA | {"case_s": 5.0}}
ROUNDS_S = 15.0
"""Fewer rounds run where they would take longer."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command.benchmark_parser(__doc__, "attention")
    command.add_attention_options(parser)
    parser.add_argument("--varlen", type=command.names, default=BASELINE, help="cases over packed documents too")
    parser.add_argument("--backends", type=command.names, default=[], help=f"by default all that run but {REFERENCE}")
    parser.add_argument("--memory", type=command.sizes, default=[], help="also a table of peaks at these tokens")
    parser.add_argument("--case-s", type=float, help="leave out rows whose pass takes more seconds")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = command.parse_for_device(parser, arguments, DEFAULTS)
    command.require_at_least(parser, options, rounds=FEWEST_ROUNDS)
    return options


def bench(options: argparse.Namespace, arguments: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device, dim = command.device_of(options.device), options.head_dim
    cases = find_cases(options.mechanisms, options.varlen)
    contenders = [*our_backends(device, options.backends), *baselines_on(device)]
    dtype = command.DTYPES[options.dtype]
    shape = Shape(heads=options.heads, head_dim=dim, value_dim=dim, dtype=dtype, device=device)
    deadline = time.monotonic() + options.budget_s
    limits = Limits(rounds=options.rounds, rounds_s=ROUNDS_S, row_s=options.case_s, deadline=deadline)
    found, pairs = AttentionBench(shape), [(contender, case) for case in cases for contender in contenders]
    with connected(Ranks(), device):
        checked = found.check_all(AttentionRow(*pair) for pair in pairs if pair[0].packed or not pair[1].packed)
        found.measure(checked, options.tokens, limits)
        memory = found.peaks_at(options.memory, limits) if options.memory else {}
    facts = machine.facts(device, arguments, tool="bench_attention")
    report = found.report(facts, options.rounds, memory, options.memory)
    return report.write(options.out or machine.default_out(device, "attention"))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can fix."""
    return command.print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
