"""Check attention on a GPU: every example of every mechanism by every backend that runs there, against float64.

What matters most comes first: all mechanisms in one shape, then one thing changed at a time, then all together.
Exit status: 0 all correct, 1 something is wrong, 2 no GPU. `python -m farspan.tools.gpu_checks --budget-s 240`.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from farspan.kernels.errors import FarspanError
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.case import Contender, Ours, Shape
from farspan.tools.bench.correctness import Check, check_rows, compare
from farspan.tools.bench_attention import JUDGE, contenders_on, device_of, names

TOKENS = 1024
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = [Heads(query=8, kv=2), Heads(query=8, kv=8), Heads(query=8, kv=1)]
HEAD_SIZES = [(128, 128), (64, 64), (192, 128), (256, 256)]
"""Of queries and keys, and of values."""


def shapes(device: torch.device) -> list[Shape]:
    """Return the product of the lists above, the shapes with fewest differences from the first of each list first."""
    places = itertools.product(*(range(len(values)) for values in (DTYPES, HEADS, HEAD_SIZES)))
    ordered = sorted(places, key=lambda place: (sum(number > 0 for number in place), place))
    return [
        Shape(
            heads=HEADS[heads],
            head_dim=HEAD_SIZES[size][0],
            value_dim=HEAD_SIZES[size][1],
            dtype=DTYPES[dtype],
            device=device,
        )
        for dtype, heads, size in ordered
    ]


def checks(
    mechanisms: Sequence[Mechanism], contenders: Sequence[Contender], device: torch.device, tokens: int
) -> Iterator[tuple[Contender, Check]]:
    """Yield everything that there is to check, the most important first, over one document and over several."""
    for shape in shapes(device):
        for packed in (True, False):
            for mechanism, contender in itertools.product(mechanisms, contenders):
                yield contender, Check(mechanism, check_rows(tokens, packed), shape)


@dataclass(slots=True)
class Tally:
    """How the checks went."""

    correct: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    def add(self, contender: Contender, check: Check) -> None:
        """Make one check, and say so if it fails."""
        verdict = compare(contender, check)
        if verdict.refused:
            self.refused[f"{contender.name}: {verdict.said}"] += 1
        elif verdict.correct:
            self.correct[contender.name] += 1
        else:
            shape = check.shape
            self.wrong.append(f"{contender.name}, {shape.dtype}, D={shape.head_dim}:{shape.value_dim}: {verdict.said}")
            print(f"WRONG: {self.wrong[-1]}", flush=True)

    def summary(self) -> str:
        lines = [f"{count} checks of {name} are correct" for name, count in sorted(self.correct.items())]
        lines += [f"{count} were refused by {reason}" for reason, count in sorted(self.refused.items())]
        lines.append(f"{len(self.wrong)} are wrong, {self.left_out} were left out as the time budget was used up")
        return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--mechanisms", type=names, default=[], help="such as dense,moba; all if not given")
    parser.add_argument("--backends", type=names, default=[], help=f"all that run here but {JUDGE}, if not given")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget_s
    try:
        device = device_of(options.device)
        chosen = [MECHANISMS.get(name) for name in options.mechanisms or MECHANISMS.load()]
        contenders = [part for part in contenders_on(device, options.backends) if isinstance(part, Ours)]
    except FarspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tally = Tally()
    with connected(Ranks(), device):
        examples = [example for cls in chosen for example in cls.examples()]
        for contender, check in checks(examples, contenders, device, options.tokens):
            if time.monotonic() > deadline:
                tally.left_out += 1
            else:
                tally.add(contender, check)
    print(tally.summary())
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
