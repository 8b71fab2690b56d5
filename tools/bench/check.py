"""Whether a contender computes a mechanism: its output and gradients against the reference backend in float64.

16-bit dtypes: its error may be twice that of the reference backend run in the same dtype, which rounds inputs and
results only; the largest difference, one roll of dice, three times. Wider dtypes: see TOLERANCE. Rivals, here for their
speed, may have SLACK times that: torch sums the gradients of a KV head's query heads in 16 bits.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.tools.bench.case import (
    Attention,
    Case,
    Contender,
    Ours,
    Shape,
    gradient_of_out,
    inputs_of,
    unmasked_share,
)

REFERENCE = Ours("reference")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Root mean square of the differences over that of the values, for dtypes whose own rounding hardly shows."""
ROUNDED, ROUNDED_LARGEST = 2.0, 3.0
SLACK = 4.0
CHECK_TOKENS = 1024
SPARSE_SHARE = 0.85
"""Visible share of the pairs of dense causal attention below which a check counts as one of a sparse mechanism."""
SPARSE_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens of a check: the reference holds all scores of a KV head's query heads in float64, several times."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: a mechanism's instance over these rows, with these heads."""

    mechanism: Mechanism
    rows: Rows
    shape: Shape

    def inputs(self) -> list[Tensor]:
        """Return the same q, k, v and routing at every call; leaves that require gradients."""
        return inputs_of(self.mechanism, len(self.rows), self.shape)

    def __str__(self) -> str:
        heads, share = self.shape.heads, unmasked_share(self.mechanism, self.rows)
        return f"{self.mechanism}, {len(self.rows)} tokens, {heads.query}:{heads.kv} heads, {share:.0%} of dense causal"


@dataclass(frozen=True, slots=True)
class Verdict:
    """correct: whether every check passed. said: what was checked, or what failed. refused: it makes no claim."""

    correct: bool
    said: str
    refused: bool = False


def check_rows(tokens: int, packed: bool) -> Rows:
    """Return one document or, packed, a long one between short ones, of odd lengths, and some padding."""
    if not packed:
        return Rows.packed([tokens])
    short = [1, tokens // 8 + 3, 3]
    return Rows.packed([*short, tokens - sum(short) - 24, 17], padding=7)


def checks(case: Case, shape: Shape, packed: bool) -> Iterator[Check]:
    """Yield what to check of a row of the table: the row's own instance, and the mechanism's examples that fit.

    packed: whether documents share the sequence. An instance that is hardly sparse in CHECK_TOKENS is checked again
    where it is, with one KV head, if memory allows.
    """
    rows = check_rows(CHECK_TOKENS, packed)
    longest = int(rows.position.max()) + 1
    yield Check(case.mechanism, rows, shape)
    for example in type(case.mechanism).examples():
        if example != case.mechanism and example.unsupported_reason(shape.heads, longest) is None:
            yield Check(example, rows, shape)
    if unmasked_share(case.mechanism, rows) < SPARSE_SHARE:
        return
    one_kv_head = replace(shape, heads=Heads(query=shape.heads.query // shape.heads.kv, kv=1))
    tokens = 2 * CHECK_TOKENS
    while tokens <= SPARSE_TOKENS[shape.device.type]:
        if unmasked_share(case.mechanism, check_rows(tokens, packed)) < SPARSE_SHARE:
            yield Check(case.mechanism, check_rows(tokens, packed), one_kv_head)
            return
        tokens *= 2


class Judge:
    """Compares contenders with the reference; what two rows of the table have in common is compared once."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._verdicts: dict[tuple[str, str], Verdict] = {}

    def judge(self, contender: Contender, case: Case) -> Verdict:
        """Compare a contender with the reference in every check of a case.

        Examples that it, or the reference, cannot compute in this shape are passed over: they say nothing of the row.
        """
        said = []
        for number, check in enumerate(checks(case, self._shape, contender.packed)):
            key = contender.name, str(check)
            if key not in self._verdicts:
                self._verdicts[key] = compare(contender, check)
            verdict = self._verdicts[key]
            if verdict.refused and number > 0:
                continue
            if not verdict.correct:
                return verdict
            said.append(verdict.said)
        return Verdict(True, "; ".join(said))


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What a check has to give: out and gradients in float64 and, of 16-bit dtypes, what the reference makes of it."""

    check: Check
    truth: list[Tensor]
    rounded: list[Tensor] | list[None]

    @staticmethod
    def of(check: Check) -> "Expected":
        """Compute it; raises ConfigError or ValueError where the reference cannot."""
        exact = REFERENCE.plan(check.mechanism, check.rows, check.shape.exact())
        inputs, dout = check.inputs(), gradient_of_out(len(check.rows), check.shape)
        truth = outcome(exact, [x.detach().double().requires_grad_() for x in inputs], dout.double())
        rounded: list[Tensor] | list[None] = [None] * len(truth)
        if check.shape.dtype not in TOLERANCE:
            rounded = outcome(REFERENCE.plan(check.mechanism, check.rows, check.shape), inputs, dout)
        return Expected(check, truth, rounded)

    def verdict(self, got: Sequence[Tensor], slack: float) -> Verdict:
        """Compare out and gradients that somebody computed."""
        names = ("out", "dq", "dk", "dv", "drouting")[: len(self.truth)]
        failures = [
            f"{name} {failure}"
            for name, mine, of_truth, of_reference in zip(names, got, self.truth, self.rounded, strict=True)
            if (failure := excess(mine, of_truth, of_reference, slack))
        ]
        return Verdict(not failures, f"{self.check}: {', '.join(failures) or 'correct'}")


def compare(contender: Contender, check: Check) -> Verdict:
    """Compare a contender with the reference in one check."""
    try:
        attention = contender.plan(check.mechanism, check.rows, check.shape)
        expected = Expected.of(check)
    except (ConfigError, ValueError) as error:
        return Verdict(False, str(error), refused=True)
    try:
        got = outcome(attention, check.inputs(), gradient_of_out(len(check.rows), check.shape))
    except Exception as error:  # whatever a kernel dies of, the other rows are measured
        return Verdict(False, f"{check}: {type(error).__name__}: {error}")
    return expected.verdict(got, 1.0 if isinstance(contender, Ours) else SLACK)


def outcome(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Return out and the gradients of the inputs."""
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def excess(got: Tensor, exact: Tensor, rounded: Tensor | None, slack: float) -> str:
    """Return how `got` differs from `exact` by more than it may, or nothing; `rounded` is the reference's."""
    if got.shape != exact.shape or not got.isfinite().all():
        return "is not finite" if got.shape == exact.shape else f"has shape {list(got.shape)}"
    if rounded is None:
        error, allowed = relative_error(got, exact), slack * TOLERANCE[got.dtype]
        return "" if error <= allowed else f"has error {error:.1e}, {allowed:.0e} is allowed"
    for kind, function, factor in (("", relative_error, ROUNDED), ("largest ", largest, ROUNDED_LARGEST)):
        error, allowed = function(got, exact), slack * factor * function(rounded, exact)
        if error > allowed:
            return f"has {kind}error {error:.1e}, {allowed:.1e} is allowed"
    return ""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The root mean square of the differences over that of the values."""
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def largest(got: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return (got.double() - exact).abs().max().item() if exact.numel() else -math.inf
