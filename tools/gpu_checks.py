"""Check attention on a GPU: every example of every mechanism by every backend that runs there, against float64.

The most important checks come first: choices, which must be the CPU's; products of experts; all mechanisms in one
shape, then one thing changed at a time, then all together. Exit status: 0 all correct, 1 something is wrong, 2 no GPU,
3 a mechanism, backend and dtype were left out altogether. `python -m farspan.tools.gpu_checks --budget-s 240`.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from farspan.errors import FarspanError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.cuda import varlen
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planner import Heads
from farspan.parallel.ranks import Ranks, connected
from farspan.tools import bench_experts, command
from farspan.tools.bench.case import Shape, dtype_name, inputs_of
from farspan.tools.bench.check import Check, Expected, Run, Verdict, check_rows, compare, compare_contender, outcome
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
    """Return the product of the lists above, the shapes with fewest differences from the first of each list first.

    Of one difference, that of the dtype comes first: other head sizes and heads are other binaries, too, but not other
    arithmetic.
    """
    indices = itertools.product(*(range(len(values)) for values in (DTYPES, HEADS, HEAD_SIZES)))
    ordered = sorted(indices, key=lambda index: (sum(number > 0 for number in index), index[::-1]))
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


def same_bits(label: str, run: Run) -> Verdict:
    """Compute twice and compare."""
    equal = all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    return Verdict(equal, f"{label}: {'the same bits twice' if equal else 'other bits the second time'}")


def far_rows(contender: Ours, shape: Shape, tokens: int) -> Verdict:
    """Compare the last rows of a window over `tokens` rows with the same rows by themselves, in float64.

    From 2^31 numbers on, offsets that are counted in 32 bits meet other rows, or none.
    """
    check, count = Check(Window(window=FAR_WINDOW), Rows.packed([tokens]), shape), FAR_ROWS + FAR_WINDOW
    inputs, dout = check.inputs(), check.gradient()

    def plan() -> Run:
        attention = contender.plan(check.mechanism, check.rows, shape)
        return lambda: [x[-FAR_ROWS:] for x in outcome(attention, inputs, dout)]

    def expect() -> Expected:
        tail = [x.detach()[-count:].clone().requires_grad_() for x in inputs]
        exact, rounded = replace(check, rows=Rows.packed([count])).expected(tail, dout[-count:].clone())
        return [x[-FAR_ROWS:] for x in exact], [None if x is None else x[-FAR_ROWS:] for x in rounded]

    return compare(f"the last of {tokens} rows, {max(x.numel() for x in inputs)} numbers", plan, expect)


Due = set[tuple[str, str, str]]
"""Mechanisms, backends and dtypes."""


def verdicts(
    examples: Sequence[Mechanism], contenders: Sequence[Ours], options: argparse.Namespace, due: Due
) -> Iterator[tuple[str, str, Verdict | None]]:
    """Yield a check's name, its shape in words and its verdict, which is None once the time budget is used up.

    due: what has not been checked so far.
    """
    deadline, device = time.monotonic() + options.budget_s, torch.device(options.device)
    first = shapes(device)[0]
    for example in examples:
        if verdict := same_choice(example, check_rows(options.tokens, packed=True), first):
            yield "choices", str(first.dtype), verdict
    for load in bench_experts.checks(device):
        row, name = bench_experts.ExpertRow(bench_experts.OURS, load), "products of experts"
        poison(device)
        yield name, name, (verdict := row.verdict())
        if verdict.correct:
            yield name, name, same_bits(load.name, row.run)
    for contender in contenders if options.far_tokens else []:
        yield contender.name, f"{contender.name}, {first.dtype}", far_rows(contender, first, options.far_tokens)
    for contender, check in checks(examples, contenders, device, options.tokens):
        name, met = contender.name, (str(check.mechanism), contender.name, dtype_name(check.shape.dtype))
        shape = f"{name}, {check.shape.dtype}, D={check.shape.head_dim}:{check.shape.value_dim}"
        if time.monotonic() > deadline:
            yield name, shape, None
            continue
        poison(device)
        yield name, shape, (verdict := compare_contender(contender, check))
        # When a backend first meets a mechanism, also compute twice.
        if met in due and check.shape.dtype == first.dtype and verdict.correct:
            no_promise = Verdict(False, "it does not promise the same bits twice", refused=True)
            twice = same_bits(str(check), check.run_of(contender)) if BACKENDS.get(name).deterministic else no_promise
            yield f"{name}, the same bits twice,", shape, twice
        due.discard(met)


def main(arguments: Sequence[str]) -> int:
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
    examples = [example for cls in chosen for example in cls.examples()]
    # One document of so few tokens is worth a plan of cuDNN, so that it is checked too.
    varlen.SHAPES = varlen.ShapeCounter(worth=options.tokens**2 // 4)
    dtypes = [dtype_name(dtype) for dtype in DTYPES]
    due = set(itertools.product(map(str, examples), [contender.name for contender in contenders], dtypes))
    correct, refused, wrong, left_out = Counter[str](), Counter[str](), 0, 0
    with connected(Ranks(), device):
        for name, shape, verdict in verdicts(examples, contenders, options, due):
            if verdict is None:
                left_out += 1
            elif verdict.refused:
                refused[f"{name}: {verdict.message}"] += 1
            elif verdict.correct:
                correct[name] += 1
            else:
                wrong += 1
                print(f"WRONG: {shape}: {verdict.message}", flush=True)
    for name, count in sorted(correct.items()):
        print(f"{count} checks of {name} are correct")
    for reason, count in sorted(refused.items()):
        print(f"{count} were refused by {reason}")
    for mechanism, backend, dtype in sorted(due):
        print(f"NOT CHECKED at all: {mechanism} by {backend} in {dtype}")
    print(f"{wrong} are wrong, {left_out} were left out as the time budget was used up")
    return WRONG if wrong else INCOMPLETE if due else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
