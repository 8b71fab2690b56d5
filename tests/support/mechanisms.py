"""Mechanisms in one process: their examples, random inputs, and all that they return."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.sequence_attention import plan_sequence_attention

Kind = TypeVar("Kind", bound=Mechanism)


def examples(kind: type[Kind] = Mechanism) -> list[Kind]:
    """The examples of all mechanisms of a kind."""
    found = [example for name in MECHANISMS for example in MECHANISMS.get(name).examples()]
    return [example for example in found if isinstance(example, kind)]


def normal(*shapes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Normal numbers, drawn in float64 one tensor after another: the same in every dtype but for their rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def inputs_of(
    mechanism: Mechanism,
    tokens: int,
    heads: Heads,
    dims: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.float64,
    seed: int = 3,
) -> list[Tensor]:
    """q, k, v, routing if there is a router, and the gradient of out; dims: of q and k, and of v."""
    query, kv = (tokens, heads.query), (tokens, heads.kv)
    shapes = (*query, dims[0]), (*kv, dims[0]), (*kv, dims[1]), (*query, dims[1]), (*kv, mechanism.routing_width)
    q, k, v, dout, routing = normal(*shapes, seed=seed, dtype=dtype)
    return [q, k, v, *([routing.to(accumulation_dtype(dtype))] if mechanism.routing_width else []), dout]


def attend(
    mechanism: Mechanism,
    rows: Rows,
    heads: Heads,
    inputs: Sequence[Tensor],
    *,
    backend: str = "reference",
    head_range: range | None = None,
) -> list[Tensor]:
    """out, lse if there is one softmax, and the gradients of q, k, v and routing, of all heads or of a range.

    inputs: as of `inputs_of`, of these heads.
    """
    *inputs, dout = inputs
    planned = plan_sequence_attention(mechanism, rows, heads, head_range or range(heads.query), backend=backend)
    out, saved = planned.forward(*inputs)
    assert out.dtype == inputs[0].dtype
    lse = planned.lse(saved)
    return [out, *([] if lse is None else [lse]), *planned.backward(dout, saved)]


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
