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
from farspan.tools.bench import machine
from farspan.tools.bench.attention import AttentionBench, AttentionRow, baselines_on
from farspan.tools.bench.case import BASELINE, Shape, find_cases
from farspan.tools.bench.contenders import REFERENCE, our_backends
from farspan.tools.bench.run import FEWEST_ROUNDS, Limits
from farspan.tools.command import (
    DTYPES,
    benchmark_parser,
    device_of,
    fill_in,
    heads,
    names,
    print_all,
    require_at_least,
    sizes,
)

CPU = {"tokens": sizes("8K,16K,32K"), "heads": heads("8:2"), "head_dim": 64, "dtype": "float32", "rounds": 3}
CUDA = {"tokens": sizes("8K,16K,32K,64K,128K,512K"), "heads": heads("32:8"), "head_dim": 128, "dtype": "bfloat16"}
DEFAULTS = {"cpu": CPU | {"case_s": 120.0}, "cuda": CUDA | {"rounds": 20, "case_s": 5.0}}
ROUNDS_S = 15.0
"""Fewer rounds run where they would take longer."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, those not given as is usual for the device."""
    parser = benchmark_parser(__doc__, "attention")
    parser.add_argument("--mechanisms", type=names, default=[], help="mechanisms, or single cases; all by default")
    parser.add_argument("--varlen", type=names, default=[BASELINE], help="cases measured over packed documents too")
    parser.add_argument("--backends", type=names, default=[], help=f"by default all that run here but {REFERENCE}")
    parser.add_argument("--tokens", type=sizes, help="such as 8K,16K,1M")
    parser.add_argument("--heads", type=heads, help="query heads:KV heads, such as 32:8")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--memory", type=sizes, default=[], help="also a table of peaks at these tokens")
    parser.add_argument("--case-s", type=float, help="leave out rows whose pass takes more seconds")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = parser.parse_args(arguments)
    fill_in(options, DEFAULTS[options.device])
    require_at_least(parser, options, rounds=FEWEST_ROUNDS)
    return options


def bench(options: argparse.Namespace, command: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device, dim = device_of(options.device), options.head_dim
    cases = find_cases(options.mechanisms, options.varlen)
    contenders = [*our_backends(device, options.backends), *baselines_on(device)]
    shape = Shape(heads=options.heads, head_dim=dim, value_dim=dim, dtype=DTYPES[options.dtype], device=device)
    deadline = time.monotonic() + options.budget_s
    limits = Limits(rounds=options.rounds, rounds_s=ROUNDS_S, row_s=options.case_s, deadline=deadline)
    found, pairs = AttentionBench(shape), [(contender, case) for case in cases for contender in contenders]
    with connected(Ranks(), device):
        checked = found.check_all(AttentionRow(*pair) for pair in pairs if pair[0].packed or not pair[1].packed)
        found.measure(checked, options.tokens, limits)
        memory = found.peaks_at(options.memory, limits) if options.memory else {}
    facts = machine.facts(device, command, tool="bench_attention")
    report = found.report(facts, options.rounds, memory, options.memory)
    return report.write(options.out or machine.default_out(device, "attention"))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can fix."""
    return print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
