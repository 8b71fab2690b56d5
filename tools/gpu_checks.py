"""Check attention on a GPU: every example of every mechanism by every backend that runs there, against float64.

The most important checks come first: choices, which must be the CPU's; products of experts; all mechanisms in one
shape, then one thing changed at a time, then all together. Exit status: 0 all correct, 1 something is wrong, 2 no GPU,
3 a mechanism and backend were left out altogether. `python -m farspan.tools.gpu_checks --budget-s 240`.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from farspan.errors import ConfigError, FarspanError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planner import Heads
from farspan.parallel.ranks import Ranks, connected
from farspan.tools import command
from farspan.tools.bench import experts
from farspan.tools.bench.case import Shape, inputs_of
from farspan.tools.bench.check import (
    Check,
    Expected,
    Verdict,
    check_rows,
    compare_contender,
    first_line,
    outcome,
    same_bits,
)  # fmt: skip
from farspan.tools.bench.contenders import REFERENCE, Ours, our_backends

TOKENS = 1024
FAR_TOKENS = 3 << 20
"""With the first shape, q has more than 2^31 numbers, and everything together takes some 50 GiB."""
FAR_WINDOW, FAR_ROWS = 128, 256
POISON_BYTES = 1 << 30
WRONG, INCOMPLETE = 1, 3
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = [Heads(query=8, kv=2), Heads(query=8, kv=8), Heads(query=8, kv=1)]
HEAD_SIZES = [(128, 128), (64, 64), (192, 128), (256, 256)]
"""Of queries and keys, and of values."""


def shapes(device: torch.device) -> list[Shape]:
    """Return the product of the lists above, the shapes with fewest differences from the first of each list first."""
    indices = itertools.product(*(range(len(values)) for values in (DTYPES, HEADS, HEAD_SIZES)))
    ordered = sorted(indices, key=lambda index: (sum(number > 0 for number in index), index))
    found = []
    for dtype, heads, size in ordered:
        dims = dict(zip(("head_dim", "value_dim"), HEAD_SIZES[size], strict=True))
        found.append(Shape(heads=HEADS[heads], **dims, dtype=DTYPES[dtype], device=device))
    return found


def checks(
    mechanisms: Sequence[Mechanism], contenders: Sequence[Ours], device: torch.device, tokens: int
) -> Iterator[tuple[Ours, Check]]:
    """Yield all checks of attention, the most important first, over one document and over several."""
    for shape in shapes(device):
        for packed in (True, False):
            for mechanism, contender in itertools.product(mechanisms, contenders):
                yield contender, Check(mechanism, check_rows(tokens, packed), shape)


def poison(device: torch.device) -> None:
    """Leave NaN in memory that is handed out again: reading it before it is written will show."""
    if device.type == "cuda":
        for size in (POISON_BYTES // 4, *[1 << 10] * 64):  # the allocator keeps small blocks apart
            torch.full((size,), float("nan"), device=device)


def same_choice(mechanism: Mechanism, rows: Rows, shape: Shape) -> Verdict | None:
    """Compare the choice on the device with that on the CPU, ties included; None if the mechanism makes no choice."""
    inputs = [x.detach() for x in inputs_of(mechanism, len(rows), replace(shape, device=torch.device("cpu")))]
    for numbers, change in (("random", lambda x: x), ("full of ties", lambda x: (x * 2).round() / 2)):
        changed = [change(x) for x in inputs]
        expected, found = (_choice(mechanism, [x.to(d) for x in changed], rows) for d in ("cpu", shape.device))
        if not expected:
            return None
        if not all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True)):
            return Verdict(False, f"{mechanism} chooses otherwise than on the CPU, numbers {numbers}")
    return Verdict(True, f"{mechanism} chooses as on the CPU")


def _choice(mechanism: Mechanism, inputs: list[Tensor], rows: Rows) -> list[Tensor]:
    """Return the routing for q, k, v and router logits as tensors; none if there is none."""
    q, k, _, *routing = inputs
    return mechanism.route(rows, Heads(query=q.shape[1], kv=k.shape[1]), q, k, *routing).tensors()


def same_bits_twice(contender: Ours, check: Check) -> Verdict:
    """Compute twice and compare, if the backend says that the same inputs give the same bits."""
    if not BACKENDS.get(contender.name).deterministic:
        return Verdict(False, "it does not promise the same bits twice", refused=True)
    try:
        return same_bits(str(check), check.run_of(contender))
    except (ConfigError, ValueError) as error:
        return Verdict(False, str(error), refused=True)


def far_rows(contender: Ours, shape: Shape, tokens: int) -> Verdict:
    """Compare the last rows of a window over `tokens` rows with the same rows by themselves, in float64.

    From 2^31 numbers on, offsets that are counted in 32 bits meet other rows, or none.
    """
    check, count = Check(Window(window=FAR_WINDOW), Rows.packed([tokens]), shape), FAR_ROWS + FAR_WINDOW
    inputs, dout = check.inputs(), check.gradient()
    label = f"the last of {tokens} rows, {max(x.numel() for x in inputs)} numbers"
    try:
        attention = contender.plan(check.mechanism, check.rows, shape)
    except (ConfigError, ValueError) as error:
        return Verdict(False, str(error), refused=True)
    try:
        found = outcome(attention, inputs, dout)
    except Exception as error:  # whatever a kernel dies of, the other checks are made
        return Verdict(False, f"{label}: {first_line(error)}")
    tail = [x.detach()[-count:].clone().requires_grad_() for x in inputs]
    expected = replace(check, rows=Rows.packed([count])).expected_of(tail, dout[-count:].clone())
    exact, rounded = ([x if x is None else x[-FAR_ROWS:] for x in xs] for xs in (expected.exact, expected.rounded))
    failures = Expected(exact, rounded).failures([x[-FAR_ROWS:] for x in found], 1.0)  # pyright: ignore[reportArgumentType]
    return Verdict(not failures, f"{label}: {', '.join(failures) or 'correct'}")


def expert_products(device: torch.device) -> Iterator[Verdict]:
    """Compare our products of rows with matrices of their experts with the formula, in all dtypes, and twice."""
    for load in experts.checks(device):
        for contender in experts.OURS:
            poison(device)
            verdict = experts.verdict(contender, load)
            yield verdict
            if verdict.correct:
                yield same_bits(load.name, experts.run_of(contender, load))


@dataclass(slots=True)
class Tally:
    """How the checks went. due: pairs of a mechanism and a backend that have not been checked so far."""

    due: set[tuple[str, str]]
    correct: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    left_out: int = 0

    def check(self, contender: Ours, check: Check) -> None:
        """Compare with float64; when a backend first meets a mechanism, also compute twice and compare the bits."""
        pair = str(check.mechanism), contender.name
        shape = f"{contender.name}, {check.shape.dtype}, D={check.shape.head_dim}:{check.shape.value_dim}"
        verdict = compare_contender(contender, check)
        self.add(contender.name, verdict, shape)
        if pair in self.due:
            self.due.remove(pair)
            if verdict.correct:
                self.add(f"{contender.name}, the same bits twice,", same_bits_twice(contender, check), shape)

    def add(self, name: str, verdict: Verdict, shape: str) -> None:
        """Count a verdict, and print it if something is wrong."""
        if verdict.refused:
            self.refused[f"{name}: {verdict.message}"] += 1
        elif verdict.correct:
            self.correct[name] += 1
        else:
            self.wrong.append(f"{shape}: {verdict.message}")
            print(f"WRONG: {self.wrong[-1]}", flush=True)

    def summary(self) -> str:
        lines = [f"{count} checks of {name} are correct" for name, count in sorted(self.correct.items())]
        lines += [f"{count} were refused by {reason}" for reason, count in sorted(self.refused.items())]
        lines += [f"NOT CHECKED at all: {mechanism} by {backend}" for mechanism, backend in sorted(self.due)]
        lines.append(f"{len(self.wrong)} are wrong, {self.left_out} were left out as the time budget was used up")
        return "\n".join(lines)

    def status(self) -> int:
        return WRONG if self.wrong else INCOMPLETE if self.due else 0


def check_all(examples: Sequence[Mechanism], contenders: Sequence[Ours], options: argparse.Namespace) -> Tally:
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
    parser = command.parser_of(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--mechanisms", type=command.names, default=[], help="such as dense,moba; all by default")
    parser.add_argument("--backends", type=command.names, default=[], help=f"by default all that run but {REFERENCE}")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--far-tokens", type=int, default=0, help=f"also a sequence of so many, such as {FAR_TOKENS}")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing after so many seconds")
    options = parser.parse_args(arguments)
    try:
        device = command.device_of(options.device)
        chosen = [MECHANISMS.get(name) for name in options.mechanisms or MECHANISMS.load()]
        contenders = our_backends(device, options.backends)
    except FarspanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with connected(Ranks(), device):
        tally = check_all([example for cls in chosen for example in cls.examples()], contenders, options)
    print(tally.summary())
    return tally.status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
