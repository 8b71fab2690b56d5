"""Every mechanism over a full sequence, on every backend and in every dtype, against the oracle in float64."""

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.kinds.token_choice import TokenChoice
from farspan.kernels.linear_attention.recurrence import RecurrentBackend
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planner import Heads
from farspan.kernels.sequence_attention import SequenceScan, plan_sequence_attention
from tests.support import oracle
from tests.support.attention_cases import ABLE, ROWS
from tests.support.mechanisms import SCORES, attend, examples, inputs_of, with_scores
from tests.support.truth import expect, visible

EXAMPLES = examples()
HEADS = [Heads(query=8, kv=8), Heads(query=8, kv=2), Heads(query=8, kv=1)]


@pytest.mark.parametrize("dtype", list(oracle.RELATIVE_TOLERANCE), ids=str)
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_mechanism_equals_the_formula(mechanism: Mechanism, backend: str, dtype: torch.dtype) -> None:
    """The dtypes take turns: together, they meet each order of rows with each number of heads."""
    for turn, (name, rows) in enumerate(ROWS.items(), list(oracle.RELATIVE_TOLERANCE).index(dtype)):
        if name == "strided" and Access.LIFETIMES in mechanism.accesses:
            continue  # lifetimes follow from all tokens of a document
        heads = HEADS[turn % len(HEADS)]
        got = attend(mechanism, rows, heads, inputs_of(mechanism, len(rows), heads, dtype=dtype), backend=backend)
        oracle.assert_close(got, expected(mechanism, name, heads, dtype), oracle.RELATIVE_TOLERANCE[dtype])


@lru_cache(maxsize=len(ROWS) * len(oracle.RELATIVE_TOLERANCE))
def expected(mechanism: Mechanism, rows: str, heads: Heads, dtype: torch.dtype) -> list[Tensor]:
    """Kept for the other backends, which are next."""
    return expect(mechanism, inputs_of(mechanism, len(ROWS[rows]), heads, dtype=dtype), ROWS[rows])


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_scores_of_any_size_equal_the_formula(mechanism: Mechanism, scores: str) -> None:
    """Forward and backward on every backend: nothing overflows or vanishes."""
    rows, heads = ROWS["ragged"], Heads(query=8, kv=2)
    for dtype in oracle.RELATIVE_TOLERANCE if scores == "huge" else (torch.float32,):
        inputs = with_scores(scores, inputs_of(mechanism, len(rows), heads, dtype=dtype))
        expected = expect(mechanism, inputs, rows)
        for backend in ABLE:
            got = attend(mechanism, rows, heads, inputs, backend=backend)
            oracle.assert_close(got, expected, oracle.tolerance(dtype, SCORES[scores]))


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_some_heads_equal_a_slice_of_all(mechanism: Mechanism, backend: str) -> None:
    """Strategies that shard heads rely on it."""
    rows, heads = ROWS["ragged"], Heads(query=8, kv=4)

    def some(x: Tensor, first: int) -> Tensor:
        """Two query heads and their KV head."""
        return x[:, first : first + 2] if x.shape[1] == 8 else x[:, first // 2 : first // 2 + 1]

    inputs = inputs_of(mechanism, len(rows), heads)
    expected = attend(mechanism, rows, heads, inputs, backend=backend)
    for first in (0, 2, 6):
        local, part = [some(x, first) for x in inputs], range(first, first + 2)
        got = attend(mechanism, rows, heads, local, backend=backend, head_range=part)
        oracle.assert_close(got, [some(x, first) for x in expected])


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_nothing_leaks_from_hidden_tokens(mechanism: Mechanism, backend: str) -> None:
    """d out_t / d (k, v)_s is exactly 0 wherever t does not see s: later tokens, other documents, tokens not chosen.

    d out_t / d routing_s is 0 for later s and other documents; to rounding where the router's gradient is a difference.
    """
    rows, heads = Rows.packed([20, 23]), Heads(query=8, kv=1)
    if isinstance(mechanism, NAtS):
        mechanism = replace(mechanism, penalty=0.0)
    *inputs, dout = inputs_of(mechanism, len(rows), heads)
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


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_what_is_not_finite_stays_in_its_document_and_padding_reaches_nothing(
    mechanism: Mechanism, backend: str
) -> None:
    """In q, k, v or the gradient of out of one token, where tiles hold rows of several documents."""
    heads, base = Heads(query=8, kv=2), Rows.packed([20, 1, 23, 11], padding=5)
    for rows in (base, base.take(torch.randperm(len(base), generator=torch.Generator().manual_seed(0)))):
        inputs = inputs_of(mechanism, len(rows), heads)
        expected = attend(mechanism, rows, heads, inputs, backend=backend)
        padding, document = rows.document < 0, rows.document == 2
        token = document & (rows.position == 7)
        for nth in (0, 1, 2, len(inputs) - 1):
            spoiled = [x.clone() for x in inputs]
            for x, number in zip(spoiled, (math.nan, math.inf, 1e38, -math.inf, math.nan), strict=False):
                x[padding] = number
            spoiled[nth][token] = math.nan
            found = attend(mechanism, rows, heads, spoiled, backend=backend)
            for a, b in zip(found, expected, strict=True):
                oracle.assert_close([a[~document]], [b[~document]])
                assert not a[padding].masked_fill(a[padding].isneginf(), 0.0).any()
            # A head that does not choose the token has nothing to show.
            if not isinstance(mechanism, TokenChoice):
                assert any(x[token].isnan().any() for x in found)


# Keys whose gradient is a sum over hundreds of queries, by each kind.
SUMMING = [
    Window(window=300),
    MoBA(block=8, top_k=64),
    BlockSparse(block=64, density=0.5),
    NAtS(window=64),
    MoSA(sparsity=2),
    Lightning(),
]


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", SUMMING, ids=str)
def test_no_sum_over_a_thousand_tokens_is_rounded_on_the_way(mechanism: Mechanism, backend: str) -> None:
    """bfloat16 rounds to 2^-9: out once, and each gradient once at the end; sums that are rounded as they grow do not.

    dq, dk and dv of all kinds have 1.9e-3 at most, and 2.3e-3 to 6.8e-3 where routed ones were summed in bfloat16.
    """
    rows, heads = Rows.packed([1024]), Heads(query=4, kv=1)
    inputs = inputs_of(mechanism, len(rows), heads, dtype=torch.bfloat16)
    got, exact = (attend(mechanism, rows, heads, x, backend=backend) for x in (inputs, [x.float() for x in inputs]))
    errors = [oracle.rms_error(a, b) for a, b in zip(got, exact, strict=True)]
    assert errors[0] <= 2.6e-3, errors
    assert max(errors[1:]) <= 2.1e-3, errors


SCANNING = [name for name in ABLE if isinstance(BACKENDS.get(name), RecurrentBackend)]
PACKED = Rows.packed([50, 1, 130], padding=3)
SCANNED = {
    "packed": PACKED,
    "shuffled": PACKED.take(torch.randperm(len(PACKED), generator=torch.Generator().manual_seed(0))),
    "padding_first": PACKED.take(torch.arange(len(PACKED)).flip(0)),
    "nothing": Rows.packed([]),
}


@pytest.mark.parametrize("dtype", list(oracle.RELATIVE_TOLERANCE), ids=str)
@pytest.mark.parametrize("order", SCANNED)
@pytest.mark.parametrize("backend", SCANNING)
@pytest.mark.parametrize("mechanism", Lightning.examples(), ids=str)
def test_scan_of_rows_in_any_order(mechanism: Lightning, backend: str, order: str, dtype: torch.dtype) -> None:
    rows, decay = SCANNED[order], mechanism.decay(8)
    *inputs, dout = inputs_of(mechanism, len(rows), Heads(query=8, kv=2), dtype=dtype)
    planned = SequenceScan.build(rows, decay, backend=backend)
    out, saved = planned.forward(*inputs)
    assert out.dtype == dtype
    q, k, v = leaves = [x.double().requires_grad_() for x in inputs]
    expected = oracle.decayed_sums(q, k, v, decay, rows)
    gradients = torch.autograd.grad(expected, leaves, dout.double())
    oracle.assert_close((out, *planned.backward(dout, saved)), (expected, *gradients), oracle.RELATIVE_TOLERANCE[dtype])


def test_scanned_rows_in_order_are_not_moved() -> None:
    assert SequenceScan.build(PACKED, torch.zeros(1), backend="cpu").order is None
    assert SequenceScan.build(SCANNED["shuffled"], torch.zeros(1), backend="cpu").order is not None
