"""What a device owes beyond right results: the CPU's choices, the same bits twice, rows beyond 2^31 numbers.

And products of experts, which are no backend's.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS
from farspan.kernels.lifetimes.lifetimes import chosen_types
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, KVLifetime, LocalShard, Mechanism, Routed, TokenChoice, identity
from farspan.kernels.mechanisms.window import Window
from farspan.tools.bench import experts
from farspan.tools.bench.case import Ours, Shape, gradient_of_out, inputs_of
from farspan.tools.bench.check import REFERENCE, Check, Verdict, excess, outcome

POISON_BYTES = 1 << 30
FAR_WINDOW, FAR_ROWS = 128, 256


def poison(device: torch.device) -> None:
    """Leave NaN in memory that is handed out again: what is read before it is written will show."""
    if device.type == "cuda":
        for size in (POISON_BYTES // 4, *[1 << 10] * 64):  # the allocator keeps small pieces apart
            torch.full((size,), float("nan"), device=device)


def same_choice(mechanism: Mechanism, rows: Rows, shape: Shape) -> Verdict | None:
    """Compare what is chosen on the device with what is chosen on the CPU, ties included; None: nothing is chosen."""
    on_cpu = replace(shape, device=torch.device("cpu"))
    inputs = [x.detach() for x in inputs_of(mechanism, len(rows), on_cpu)]
    for said, change in (("random", lambda x: x), ("full of ties", lambda x: (x * 2).round() / 2)):
        changed = [change(x) for x in inputs]
        expected, found = (_choice(mechanism, [x.to(d) for x in changed], rows) for d in ("cpu", shape.device))
        if expected is None or found is None:
            return None
        if not all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True)):
            return Verdict(False, f"{mechanism} chooses otherwise than on the CPU, numbers {said}")
    return Verdict(True, f"{mechanism} chooses as on the CPU")


def _choice(mechanism: Mechanism, inputs: list[Tensor], rows: Rows) -> list[Tensor] | None:
    """Return what is chosen for q, k, v and routing, as tensors."""
    q, k, *_, last = inputs
    if isinstance(mechanism, Routed):
        local_shard = LocalShard(
            mechanism=mechanism,
            rows=rows,
            global_rows=rows,
            heads=range(q.shape[1]),
            all_heads=Heads(query=q.shape[1], kv=k.shape[1]),
            total=identity,
        )
        selection = mechanism.select(q, k, local_shard)
        return [selection.offsets, selection.chosen]
    if isinstance(mechanism, TokenChoice):
        return [mechanism.choose(last[..., 0].float(), rows)]
    return [chosen_types(last)] if isinstance(mechanism, KVLifetime) else None


def same_bits(contender: Ours, check: Check) -> Verdict:
    """Compute twice and compare, if the backend says that the same inputs give the same bits."""
    if not BACKENDS.get(contender.name).deterministic:
        return Verdict(False, "it does not promise the same bits twice", refused=True)
    try:
        attention = contender.plan(check.mechanism, check.rows, check.shape)
    except (ConfigError, ValueError) as error:
        return Verdict(False, str(error), refused=True)
    inputs = inputs_of(check.mechanism, len(check.rows), check.shape)
    dout = gradient_of_out(len(check.rows), check.shape)
    first, second = (outcome(attention, inputs, dout) for _ in range(2))
    equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return Verdict(equal, f"{check}: {'the same bits twice' if equal else 'other bits the second time'}")


def far_rows(contender: Ours, shape: Shape, tokens: int) -> Verdict:
    """Compare the last rows of a window over `tokens` rows with the same rows by themselves, in float64.

    From 2^31 numbers on, offsets that are counted in 32 bits meet other rows, or none.
    """
    mechanism, kept = Window(window=FAR_WINDOW), FAR_ROWS + FAR_WINDOW
    try:
        attention = contender.plan(mechanism, Rows.packed([tokens]), shape)
    except (ConfigError, ValueError) as error:
        return Verdict(False, str(error), refused=True)
    inputs, dout = inputs_of(mechanism, tokens, shape), gradient_of_out(tokens, shape)
    try:
        found = outcome(attention, inputs, dout)
    except Exception as error:  # whatever a kernel dies of, the other checks are made
        return Verdict(False, f"{tokens} rows: {type(error).__name__}: {error}")
    tail = [x.detach()[-kept:].clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in tail]
    rows, dout = Rows.packed([kept]), dout[-kept:].clone()
    truth = outcome(REFERENCE.plan(mechanism, rows, shape.exact()), exact, dout.double())
    rounded = outcome(REFERENCE.plan(mechanism, rows, shape), tail, dout)
    failures = [
        f"{name} {failure}"
        for name, mine, right, of_reference in zip(("out", "dq", "dk", "dv"), found, truth, rounded, strict=True)
        if (failure := excess(mine[-FAR_ROWS:], right[-FAR_ROWS:], of_reference[-FAR_ROWS:], 1.0))
    ]
    largest = max(x.numel() for x in inputs)
    return Verdict(not failures, f"the last of {tokens} rows, {largest} numbers: {', '.join(failures) or 'correct'}")


def expert_products(device: torch.device) -> Iterator[Verdict]:
    """Compare our products of rows with matrices of their experts with the formula, in all dtypes, and twice."""
    for load in experts.checks(device):
        for contender in experts.OURS:
            poison(device)
            verdict = experts.verdict(contender, load)
            yield verdict
            if verdict.correct:
                yield experts.same_bits(contender, load)
