"""Measure what saving costs the steps of a run, in the background and not, and what verification adds to loading.

Writes JSON and Markdown: `python -m farspan.tools.bench_checkpoint --device cpu`. Ratios are of rounds in one process;
the device keeps the parameters, and a core of the CPU is left to the saving.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import machine
from farspan.tools.bench.checkpoint import CheckpointBench
from farspan.tools.command import benchmark_parser, device_of, print_all


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, "checkpoint", rounds=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scratch", type=Path, help="a folder for the checkpoints; that of temporary files by default")
    return parser.parse_args(arguments)


def bench(options: argparse.Namespace, command: Sequence[str]) -> Iterable[object]:
    """Measure and write the files; yield lines and paths. Raises ConfigError for options that cannot work."""
    device = device_of(options.device)
    torch.set_num_threads(max((os.cpu_count() or 2) - 1, 1))
    facts = machine.facts(device, command, tool="bench_checkpoint")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, connected(Ranks(), device):
        run = CheckpointBench(options.layers, options.width, device, Path(scratch))
        run.round()
        report = run.report([run.round() for _ in range(options.rounds)], facts)
    yield from report.tables[0].markdown()
    yield from report.write(options.out or machine.default_out(device, "checkpoint"))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can fix."""
    return print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
