"""Measure attention: every mechanism of the registry by every backend of a device, beside what torch offers.

Writes JSON, Markdown and a plot. Each pair is checked against float64 in the same run; a wrong one gets no number:
`python -m farspan.tools.bench_attention --tokens 8K,16K,32K`.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanism import Heads
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import machine, report
from farspan.tools.bench.attention import records_of
from farspan.tools.bench.case import BASELINE, Contender, Ours, Shape, find_cases
from farspan.tools.bench.contenders import rivals_on
from farspan.tools.bench.plot import human
from farspan.tools.bench.run import LeftOut, Limits, Pair, Result, judge_all, measure_all, measure_memory
from farspan.tools.command import print_all

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
JUDGE = "reference"
DEFAULTS = {
    "cpu": {"tokens": "8K,16K,32K", "heads": "8:2", "head_dim": 64, "dtype": "float32", "rounds": 3, "case_s": 120.0},
    "cuda": {
        "tokens": "8K,16K,32K,64K,128K,512K",
        "heads": "32:8",
        "head_dim": 128,
        "dtype": "bfloat16",
        "rounds": 20,
        "case_s": 5.0,
    },
}
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def sizes(text: str) -> list[int]:
    """Return the numbers of tokens in a list such as 8K,16K,1M."""
    found = [re.fullmatch(r"([1-9]\d*)([KM]?)", part.strip().upper()) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of tokens such as 8K,16K,1M")
    return [int(match[1]) * UNITS[match[2]] for match in found if match]


def heads(text: str) -> Heads:
    """Return the query and KV heads of a text such as 32:8."""
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if not match or int(match[1]) % int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not query heads:KV heads, the first a multiple, such as 32:8")
    return Heads(query=int(match[1]), kv=int(match[2]))


def names(text: str) -> list[str]:
    """Return the names in a list such as dense,window."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options, those not given as is usual for the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--mechanisms", type=names, default=[], help="mechanisms, or rows of them; all if not given")
    parser.add_argument("--varlen", type=names, default=[BASELINE], help="rows measured over packed documents too")
    parser.add_argument("--backends", type=names, default=[], help=f"all that run here but {JUDGE}, if not given")
    parser.add_argument("--tokens", type=sizes, help="such as 8K,16K,1M")
    parser.add_argument("--heads", type=heads, help="query heads:KV heads, such as 32:8")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--rounds", type=int, help="timings of each row, at least 3")
    parser.add_argument("--memory", type=sizes, default=[], help="also a table of peaks at these tokens")
    parser.add_argument("--case-s", type=float, help="leave out what takes longer per pass, in seconds")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    parser.add_argument("--out", type=Path, help="path without suffix; docs/benchmarks/DATE_DEVICE_attention")
    options = parser.parse_args(arguments)
    for name, default in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            convert = {"tokens": sizes, "heads": heads}.get(name, lambda value: value)
            setattr(options, name, convert(default))
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds} must be at least 3: a median of fewer is none")
    return options


def device_of(name: str) -> torch.device:
    """Return the device; raises ConfigError where there is no such GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda needs a CUDA GPU, and torch {torch.__version__} sees none here.")
    return torch.device(name)


def contenders_on(device: torch.device, chosen: Sequence[str]) -> list[Contender]:
    """Return our backends, those `chosen` or all that run on the device, then the rivals.

    Raises ConfigError for a backend that does not exist or cannot run here.
    """
    for name in chosen:
        if reason := BACKENDS.get(name).unsupported_reason(device):
            raise ConfigError(f"--backends {name} cannot run on {device.type}: {reason}.")
    able = [
        name
        for name, backend in BACKENDS.load().items()
        if name != JUDGE and backend.unsupported_reason(device) is None
    ]
    return [*(Ours(name) for name in chosen or able), *rivals_on(device)]


def bench(options: argparse.Namespace, command: Sequence[str]) -> list[Path]:
    """Check, measure, and write the files; return their paths. Raises ConfigError for options that cannot work."""
    device = device_of(options.device)
    cases, contenders = find_cases(options.mechanisms, options.varlen), contenders_on(device, options.backends)
    shape = Shape(
        heads=options.heads,
        head_dim=options.head_dim,
        value_dim=options.head_dim,
        dtype=DTYPES[options.dtype],
        device=device,
    )
    limits = Limits(rounds=options.rounds, case_s=options.case_s, deadline=time.monotonic() + options.budget_s)
    left_out, results = LeftOut(), []
    with connected(Ranks(), device):
        pairs = judge_all(cases, contenders, shape, left_out)
        _say_verdicts(pairs)
        for of_size in measure_all(pairs, options.tokens, shape, limits, left_out):
            _say_times(of_size)
            results += of_size
        memory = measure_memory(results, pairs, options.memory, shape, limits) if options.memory else {}
    found = report.Report(
        machine=machine.facts(device, command),
        pairs=pairs,
        results=results,
        records=records_of(results, shape),
        left_out=left_out,
        rounds=options.rounds,
        memory_sizes=options.memory,
        memory=memory,
    )
    return report.write(found, options.out or machine.default_out(device, "attention"))


def _say_verdicts(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        print(f"{pair.name}: {'correct' if pair.verdict.correct else 'NOT CORRECT: ' + pair.verdict.said}", flush=True)


def _say_times(results: Sequence[Result]) -> None:
    for result in results:
        if result.times is not None:
            ms = result.times.median("fwd_bwd")
            print(f"{human(result.tokens):>6} tokens  {result.pair.name:<40}{ms:12.2f} ms", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status, 2 for an error that the caller can mend."""
    return print_all(lambda: bench(parse(arguments), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
