"""Correctness before numbers: outputs and gradients of a contender against the reference in float64.

16-bit dtypes: the error may be twice that of the reference run in the same dtype, which rounds inputs and results only;
the largest difference, which depends on chance, three times. Wider dtypes: see TOLERANCE. Baselines may have SLACK
times that.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.tools.bench.case import Attention, Case, Shape, gradient_of_out, inputs_of, unmasked_share
from farspan.tools.bench.contenders import REFERENCE, Contender, NamedContender, Ours
from farspan.tools.rank_pool import RankError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Root mean square of the differences over that of the values, for dtypes whose own rounding hardly shows."""
ROUNDED, ROUNDED_LARGEST = 2.0, 3.0
CHECK_TOKENS = 1024
SPARSE_SHARE = 0.85
"""Unmasked share of the pairs of dense causal attention below which a check counts as one of a sparse mechanism."""
SPARSE_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Most tokens of a check: the reference holds all scores of a KV head's query heads in float64, several times."""
RESULTS = ("out", "dq", "dk", "dv", "drouting")

Run = Callable[[], Sequence[Tensor]]
"""Computes out and the gradients of all inputs."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """message: the checks that passed, or the failure. refused: it makes no claim. crashed: it raised."""

    correct: bool
    message: str
    refused: bool = False
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: a mechanism's instance over these rows, with these heads."""

    mechanism: Mechanism
    rows: Rows
    shape: Shape

    def inputs(self) -> list[Tensor]:
        """Return the same q, k, v and routing at every call; leaves that require gradients."""
        return inputs_of(self.mechanism, len(self.rows), self.shape)

    def gradient(self) -> Tensor:
        return gradient_of_out(len(self.rows), self.shape)

    def run_of(self, contender: Contender) -> Run:
        """Return the contender's computation; raises ConfigError or ValueError where it makes no claim."""
        attention = contender.plan(self.mechanism, self.rows, self.shape)
        return lambda: outcome(attention, self.inputs(), self.gradient())

    def expected(self, inputs: list[Tensor] | None = None, dout: Tensor | None = None) -> "Expected":
        """Compute the expected results; raises ConfigError or ValueError where the reference cannot."""
        shapes = replace(self.shape, dtype=torch.float64), self.shape
        exact, same_dtype = (Ours(REFERENCE).plan(self.mechanism, self.rows, shape) for shape in shapes)
        return expected_of(exact, same_dtype, inputs or self.inputs(), self.gradient() if dout is None else dout)

    def __str__(self) -> str:
        heads, share = self.shape.heads, unmasked_share(self.mechanism, self.rows)
        return f"{self.mechanism}, {len(self.rows)} tokens, {heads.query}:{heads.kv} heads, {share:.0%} of dense causal"


Expected = tuple[Sequence[Tensor], Sequence[Tensor | None]]
"""Out and gradients in float64 and, for 16-bit dtypes, the reference's in the same dtype."""


def expected_of(exact: Attention, same_dtype: Attention, inputs: Sequence[Tensor], dout: Tensor) -> Expected:
    truth = outcome(exact, [x.detach().double().requires_grad_() for x in inputs], dout.double())
    return truth, [None] * len(truth) if dout.dtype in TOLERANCE else outcome(same_dtype, inputs, dout)


def check_rows(tokens: int, packed: bool) -> Rows:
    """Return one document or, packed, a long one between short ones, of odd lengths, and some padding."""
    if not packed:
        return Rows.packed([tokens])
    short = [1, tokens // 8 + 3, 3]
    return Rows.packed([*short, tokens - sum(short) - 24, 17], padding=7)


def checks(case: Case, shape: Shape, packed: bool) -> Iterator[Check]:
    """Yield the checks of a case: its own instance, and the mechanism's examples that fit.

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
    while len(rows) < SPARSE_TOKENS[shape.device.type]:
        rows = check_rows(2 * len(rows), packed)
        if unmasked_share(case.mechanism, rows) < SPARSE_SHARE:
            yield Check(case.mechanism, rows, one_kv_head)
            return


class Checker:
    """Checks cases; a check that two cases share is made once for each contender."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._case: Case | None = None
        self._expected: dict[tuple[str, bool], Expected] = {}

    def check(self, contender: NamedContender, setting: str, case: Case, plan: Callable[[Check], Run]) -> Verdict:
        """Make every check of a case.

        setting: contender and all that its results depend on besides the check. plan: returns the computation of a
        check, or raises ConfigError or ValueError. Examples that the contender or the reference cannot compute in this
        shape are passed over: they tell nothing about the case.
        """
        if case != self._case:  # expected results are large: cached for the contenders of one case
            self._case, self._expected = case, {}
        messages = []
        for number, check in enumerate(checks(case, self._shape, contender.packed)):
            key = setting, str(check)
            if key not in self._verdicts:
                expect = partial(self._expect, check, contender.packed)
                self._verdicts[key] = compare(str(check), partial(plan, check), expect, contender.slack)
            verdict = self._verdicts[key]
            if verdict.refused and number > 0:
                continue
            if not verdict.correct:
                return verdict
            messages.append(verdict.message)
        return Verdict(True, "; ".join(messages))

    def _expect(self, check: Check, packed: bool) -> Expected:
        # Contenders without packed documents have other rows, of which the text of a check says nothing.
        key = str(check), packed
        if key not in self._expected:
            self._expected[key] = check.expected()
        return self._expected[key]


def compare(
    label: str,
    plan: Callable[[], Run],
    expect: Callable[[], Expected],
    slack: float = 1.0,
    names: Sequence[str] = RESULTS,
) -> Verdict:
    """Compare a computation with the expected results; where either cannot be planned, it is refused."""
    try:
        run, (exact, rounded) = plan(), expect()
    except (ConfigError, ValueError) as error:
        return Verdict(False, str(error), refused=True)
    try:
        got = run()
    except Exception as error:  # whatever a kernel dies of, the other rows are measured
        return Verdict(False, f"{label}: {first_line(error)}", crashed=True)
    compared = zip(names[: len(exact)], got, exact, rounded, strict=True)
    failures = [f"{name} {failure}" for name, x, y, z in compared if (failure := excess(x, y, z, slack))]
    return Verdict(not failures, f"{label}: {', '.join(failures) or 'correct'}")


def compare_contender(contender: Contender, check: Check) -> Verdict:
    return compare(str(check), lambda: check.run_of(contender), check.expected, contender.slack)


def first_line(error: Exception) -> str:
    """Return an error on one line, with its type where it is not farspan's."""
    if isinstance(error, RankError):
        return error.summary
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def outcome(attention: Attention, inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def excess(got: Tensor, exact: Tensor, rounded: Tensor | None, slack: float = 1.0) -> str:
    """Return how `got` differs from `exact` by more than it may, or nothing; `rounded` is the reference's."""
    if got.shape != exact.shape or not got.isfinite().all():
        return "is not finite" if got.shape == exact.shape else f"has shape {list(got.shape)}"
    if not exact.any():
        return "is not 0" if got.any() else ""
    if rounded is None:
        error, allowed = relative_error(got, exact), slack * TOLERANCE[got.dtype]
        return "" if error <= allowed else f"has error {error:.1e}, {allowed:.0e} is allowed"
    for kind, function, factor in (("", relative_error, ROUNDED), ("largest ", largest_error, ROUNDED_LARGEST)):
        error, allowed = function(got, exact), slack * factor * function(rounded, exact)
        if error > allowed:
            return f"has {kind}error {error:.1e}, {allowed:.1e} is allowed"
    return ""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the differences over that of the values."""
    return ((got.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def largest_error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item() if exact.numel() else -math.inf
