"""Check attention on a GPU: every example of every mechanism by every backend that runs there, against float64.

What matters most comes first: choices, which must be the CPU's; products of experts; all mechanisms in one shape, then
one thing changed at a time, then all together. Exit status: 0 all correct, 1 something is wrong, 2 no GPU, 3 a
mechanism and backend were left out altogether. `python -m farspan.tools.gpu_checks --budget-s 240`.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from farspan.errors import FarspanError
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.case import Ours, Shape
from farspan.tools.bench.check import Check, Verdict, check_rows, compare
from farspan.tools.bench.device_checks import expert_products, far_rows, poison, same_bits, same_choice
from farspan.tools.bench_attention import JUDGE, contenders_on, device_of, names

TOKENS = 1024
FAR_TOKENS = 3 << 20
"""With the first shape, q has more than 2^31 numbers, and everything together takes some 50 GiB."""
WRONG, INCOMPLETE = 1, 3
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
    mechanisms: Sequence[Mechanism], contenders: Sequence[Ours], device: torch.device, tokens: int
) -> Iterator[tuple[Ours, Check]]:
    """Yield everything that there is to check, the most important first, over one document and over several."""
    for shape in shapes(device):
        for packed in (True, False):
            for mechanism, contender in itertools.product(mechanisms, contenders):
                yield contender, Check(mechanism, check_rows(tokens, packed), shape)


@dataclass(slots=True)
class Tally:
    """How the checks went. due: pairs of a mechanism and a backend of which nothing has been checked so far."""

    due: set[tuple[str, str]]
    correct: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    def check(self, contender: Ours, check: Check) -> None:
        """Compare with float64; when a backend first meets a mechanism, see that it gives the same bits twice."""
        pair = str(check.mechanism), contender.name
        shape = f"{contender.name}, {check.shape.dtype}, D={check.shape.head_dim}:{check.shape.value_dim}"
        verdict = compare(contender, check)
        self.add(contender.name, verdict, shape)
        if pair in self.due:
            self.due.remove(pair)
            if verdict.correct:
                self.add(f"{contender.name}, the same bits twice,", same_bits(contender, check), shape)

    def add(self, name: str, verdict: Verdict, shape: str) -> None:
        """Count a verdict, and say so if something is wrong."""
        if verdict.refused:
            self.refused[f"{name}: {verdict.said}"] += 1
        elif verdict.correct:
            self.correct[name] += 1
        else:
            self.wrong.append(f"{shape}: {verdict.said}")
            print(f"WRONG: {self.wrong[-1]}", flush=True)

    def summary(self) -> str:
        lines = [f"{count} checks of {name} are correct" for name, count in sorted(self.correct.items())]
        lines += [f"{count} were refused by {reason}" for reason, count in sorted(self.refused.items())]
        lines += [f"NOT CHECKED at all: {mechanism} by {backend}" for mechanism, backend in sorted(self.due)]
        lines.append(f"{len(self.wrong)} are wrong, {self.left_out} were left out as the time budget was used up")
        return "\n".join(lines)

    def status(self) -> int:
        return WRONG if self.wrong else INCOMPLETE if self.due else 0


def make(examples: Sequence[Mechanism], contenders: Sequence[Ours], options: argparse.Namespace) -> Tally:
    """Make all checks that the time budget allows."""
    deadline, device = time.monotonic() + options.budget_s, torch.device(options.device)
    tally = Tally({(str(example), contender.name) for example in examples for contender in contenders})
    first = shapes(device)[0]
    for example in examples:
        verdict = same_choice(example, check_rows(options.tokens, packed=True), first)
        if verdict is not None:
            tally.add("choices", verdict, str(first.dtype))
    for verdict in expert_products(device):
        tally.add("products of experts", verdict, "products of experts")
    for contender in contenders if options.far_tokens else []:
        tally.add(contender.name, far_rows(contender, first, options.far_tokens), f"{contender.name}, {first.dtype}")
    for contender, check in checks(examples, contenders, device, options.tokens):
        if time.monotonic() > deadline:
            tally.left_out += 1
        else:
            poison(device)
            tally.check(contender, check)
    return tally


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--mechanisms", type=names, default=[], help="such as dense,moba; all if not given")
    parser.add_argument("--backends", type=names, default=[], help=f"all that run here but {JUDGE}, if not given")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--far-tokens", type=int, default=0, help=f"also a sequence of so many, such as {FAR_TOKENS}")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = parser.parse_args(arguments)
    try:
        device = device_of(options.device)
        chosen = [MECHANISMS.get(name) for name in options.mechanisms or MECHANISMS.load()]
        contenders = [part for part in contenders_on(device, options.backends) if isinstance(part, Ours)]
    except FarspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with connected(Ranks(), device):
        tally = make([example for cls in chosen for example in cls.examples()], contenders, options)
    print(tally.summary())
    return tally.status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
