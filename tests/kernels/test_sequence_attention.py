"""Every mechanism over a full sequence, on every backend and in every dtype, against the oracle in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import Heads
from farspan.kernels.sequence_attention import plan_sequence_attention
from tests.support import oracle
from tests.support.attention_cases import ABLE, ROWS, examples
from tests.support.truth import expect, visible

EXAMPLES = examples()
HEADS = [Heads(query=8, kv=8), Heads(query=8, kv=2), Heads(query=8, kv=1)]


def random_inputs(mechanism: Mechanism, rows: Rows, heads: Heads, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and routing if there is one, and the gradient of out."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(len(rows), *shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [draw(heads.query, 16), draw(heads.kv, 16), draw(heads.kv, 8)]
    if mechanism.routing_width:
        inputs.append(draw(heads.kv, mechanism.routing_width).to(accumulation_dtype(dtype)))
    return inputs, draw(heads.query, 8)


def run(mechanism: Mechanism, inputs: list[Tensor], dout: Tensor, rows: Rows, heads: Heads, backend: str):
    attention = plan_sequence_attention(mechanism, rows, heads, range(heads.query), backend=backend)
    out, saved = attention.forward(*inputs)
    assert out.dtype == inputs[0].dtype
    return results(out, attention.lse(saved), attention.backward(dout, saved))


def results(out: Tensor, lse: Tensor | None, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    return [out, *([] if lse is None else [lse]), *gradients]


@pytest.mark.parametrize("dtype", list(oracle.RELATIVE_TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_mechanism_equals_the_formula(mechanism: Mechanism, backend: str, dtype: torch.dtype) -> None:
    for name, rows in ROWS.items():
        for heads in HEADS:
            inputs, dout = random_inputs(mechanism, rows, heads, dtype)
            got = run(mechanism, inputs, dout, rows, heads, backend)
            expected = expect(mechanism, inputs, dout, rows)
            errors = [oracle.relative_error(a, b) for a, b in zip(got, expected, strict=True)]
            assert max(errors) <= oracle.RELATIVE_TOLERANCE[dtype], (name, heads, errors)


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_some_heads_equal_a_slice_of_all(mechanism: Mechanism, backend: str) -> None:
    """Strategies that shard heads rely on it."""
    rows, heads = ROWS["ragged"], Heads(query=8, kv=4)
    inputs, dout = random_inputs(mechanism, rows, heads, torch.float64)
    expected = run(mechanism, inputs, dout, rows, heads, backend)
    for first in (0, 2, 6):
        part = plan_sequence_attention(mechanism, rows, heads, range(first, first + 2), backend=backend)
        local = [x[:, first : first + 2] if x.shape[1] == 8 else x[:, first // 2 : first // 2 + 1] for x in inputs]
        out, saved = part.forward(*local)
        got = results(out, part.lse(saved), part.backward(dout[:, first : first + 2], saved))
        for some_heads, all_heads in zip(got, expected, strict=True):
            start = first if all_heads.shape[1] == 8 else first // 2
            error = oracle.relative_error(some_heads, all_heads[:, start : start + some_heads.shape[1]])
            assert error <= oracle.RELATIVE_TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_nothing_leaks_from_hidden_tokens(mechanism: Mechanism, backend: str) -> None:
    """d out_t / d (k, v)_s is exactly 0 wherever t does not see s: later tokens, other documents, tokens not chosen.

    d out_t / d routing_s is 0 for later s and other documents; to rounding where the router's gradient is a difference.
    """
    rows, heads = Rows.packed([20, 23]), Heads(query=8, kv=1)
    if isinstance(mechanism, NAtS):
        mechanism = replace(mechanism, penalty=0.0)
    inputs, dout = random_inputs(mechanism, rows, heads, torch.float64)
    attention = plan_sequence_attention(mechanism, rows, heads, range(8), backend=backend)
    _, saved = attention.forward(*inputs)
    mask, document = visible(mechanism, inputs, rows).any(dim=0), rows.document
    for t in (0, 7, 19, 20, 30, 42):
        only_t = torch.zeros_like(dout)
        only_t[t] = dout[t]
        dq, dk, dv, *drouting = attention.backward(only_t, saved)
        assert not dq[torch.arange(len(rows)) != t].any()
        assert not dk[~mask[t]].any()
        assert not dv[~mask[t]].any()
        for gradient in drouting:
            assert not gradient[document != document[t]].any()
            assert (gradient[t + 1 :].abs() <= 1e-14).all()
