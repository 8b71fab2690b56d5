"""Mechanisms in one process: their examples, random inputs, and all that they return."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.testing import attend, inputs_of, normal

__all__ = ["SCORES", "attend", "examples", "inputs_of", "normal", "with_scores"]
Kind = TypeVar("Kind", bound=Mechanism)


def examples(kind: type[Kind] = Mechanism) -> list[Kind]:
    """The examples of all mechanisms of a kind."""
    found = [example for name in MECHANISMS for example in MECHANISMS.get(name).examples()]
    return [example for example in found if isinstance(example, kind)]


SCORES = {"large": 10.0, "huge": 100.0, "negative": 100.0, "equal": 1.0, "one_key": 32.0}
"""Ways to change the scores of inputs, and how much their rounding grows with."""


def with_scores(kind: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return inputs as of `inputs_of` whose scores are of a kind of SCORES.

    negative: every log-sum-exp is some thousands below 0. equal: all scores of a query are 0. one_key: one key in the
    middle is a thousand times as large.
    """
    q, k, *rest = (x.clone() for x in inputs)
    if kind in ("large", "huge"):
        q, k = q * SCORES[kind], k * SCORES[kind]
    elif kind == "negative":
        q, k = q.abs() * 30, -30 * (k.abs() + 0.5)
    elif kind == "equal":
        q.zero_()
    else:
        k[len(k) // 2] *= 1000
    return [q, k, *rest]
