"""Command lines of the tools: their options, the device, and how they print results and errors."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from farspan.errors import ConfigError, FarspanError
from farspan.kernels.mechanism import Heads
from farspan.launch.commands.arguments import Parser
from farspan.tools.bench.case import Shape

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20}


def print_all(find: Callable[[], Iterable[object]]) -> int:
    """Print each result on a line; return the exit status, 2 for an error that the caller can fix."""
    try:
        for line in find():
            print(line)
    except FarspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def benchmark_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = parser_of(doc)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="how often each row is timed")
    parser.add_argument("--out", type=Path, help="path without suffix; default docs/benchmarks/DATE_DEVICE_BENCHMARK")
    return parser


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mechanisms", type=names, default=[], help="mechanisms, or single cases; all by default")
    parser.add_argument("--tokens", type=sizes, help="such as 8K,16K,1M")
    parser.add_argument("--heads", type=heads, help="query heads:KV heads, such as 32:8")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=DTYPES)


def shape_of(options: argparse.Namespace) -> Shape:
    """Return the shape of `add_attention_options`; raises ConfigError where there is no such GPU."""
    dim, dtype, device = options.head_dim, DTYPES[options.dtype], device_of(options.device)
    return Shape(heads=options.heads, head_dim=dim, value_dim=dim, dtype=dtype, device=device)


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    defaults: Mapping[str, Mapping[str, object]],
    **least: float,
) -> argparse.Namespace:
    """Return the options, those not given as is usual for the device; exit with an error where one is too small."""
    parser.set_defaults(**defaults[parser.parse_known_args(arguments)[0].device])
    options = parser.parse_args(arguments)
    for name, limit in least.items():
        if getattr(options, name) < limit:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name):g} must be at least {limit}")
    return options


def sizes(text: str) -> list[int]:
    """Return the numbers in a list such as 2,4 or 8K,1M."""
    found = [re.fullmatch(r"([1-9]\d*)([KM]?)", part.strip().upper()) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2,4 or 8K,1M")
    return [int(match[1]) * SUFFIXES[match[2]] for match in found if match]


def human(tokens: int) -> str:
    """Return tokens as 512, 16K or 1M, in powers of 1024 where they divide."""
    suffix, unit = next(((s, u) for s, u in reversed(SUFFIXES.items()) if tokens >= u and tokens % u == 0), ("", 1))
    return f"{tokens // unit}{suffix}"


def heads(text: str) -> Heads:
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if not match or int(match[1]) % int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not query heads:KV heads, the first a multiple, such as 32:8")
    return Heads(query=int(match[1]), kv=int(match[2]))


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def device_of(name: str) -> torch.device:
    """Return the device; raises ConfigError where there is no such GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device cuda needs a CUDA GPU, and torch {torch.__version__} sees none here.")
    return torch.device(name)
