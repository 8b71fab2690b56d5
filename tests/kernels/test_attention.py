"""Attention of rows to rows on every backend, against the oracle in float64, and what strategies build on."""

import pytest
import torch

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.kernels.mechanisms.spans import Spans
from farspan.kernels.planning.plan import Plan
from tests.support.attention_cases import (
    ABLE,
    ATTENTION_MASKS,
    ROWS,
    Tensors,
    check,
    check_blind,
    mask_and_selection,
    mask_of,
    run,
    run_parts,
)
from tests.support.mechanisms import examples
from tests.support.oracle import assert_close, rms_error

# One mechanism for each way that a plan hides keys: a mask, one per head, a grid, selections by row and by tile.
HIDING = [Dense(), Spans.examples()[0], Neighborhood.examples()[0], MoBA(block=4, top_k=2), BlockSparse(block=8)]


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
@pytest.mark.parametrize("backend", ABLE)
def test_equals_the_formula(attention_mask: AttentionMask, backend: str) -> None:
    for rows in ROWS.values():
        for keys in (rows, ROWS["strided"]):
            check(Tensors.random(len(rows), len(keys)), rows, keys, attention_mask, backend)


@pytest.mark.parametrize("dims", [(16, 16), (40, 40), (96, 64), (64, 96), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("backend", ABLE)
def test_head_sizes(backend: str, dims: tuple[int, int]) -> None:
    rows = ROWS["ragged"]
    check(Tensors.random(len(rows), len(rows), dims=dims), rows, rows, AttentionMask(), backend)


@pytest.mark.parametrize("order", ["runs", "irregular"])
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", HIDING, ids=str)
def test_nothing_leaks_from_hidden_keys(mechanism: Mechanism, backend: str, order: str) -> None:
    """d out_t / d (k, v)_s is exactly 0 wherever s is hidden from t, even if its score would exceed all others."""
    rows = Rows.packed([20, 23])
    if order == "irregular":
        rows = rows.take(torch.randperm(43, generator=torch.Generator().manual_seed(0)))
    q, k, v, dout = tensors = Tensors.random(len(rows), len(rows), (8, 1))
    attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
    plan = Plan.build(rows, rows, attention_mask, heads=8, selection=selection, shortest_run=8)
    out, lse = attention_forward(q, k, v, plan, backend=backend)
    # k has a single head: keys visible in any query head are not hidden.
    mask = mask_of(rows, rows, attention_mask, 8, selection).any(dim=0)
    for t in (0, 7, 19, 20, 30, 42):
        hidden = [s for s in range(len(rows)) if not mask[t, s]]
        other_k, other_v = k.clone(), v.clone()
        other_k[hidden] *= 1e6
        other_v[hidden] -= 50.0
        changed, _ = attention_forward(q, other_k, other_v, plan, backend=backend)
        assert torch.equal(changed[t], out[t])
        only_t = torch.zeros_like(out)
        only_t[t] = dout[t]
        _, dk, dv = attention_backward(only_t, q, k, v, out, lse, plan, backend=backend)
        assert not dk[hidden].any()
        assert not dv[hidden].any()


@pytest.mark.parametrize("backend", [*ABLE, "cuda"])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_at_all(backend: str, queries: int, keys: int) -> None:
    check_blind(Rows.packed([queries]), Rows.packed([keys]), backend, torch.bfloat16)


@pytest.mark.parametrize("backend", ABLE)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    """torch's CPU operator is silently wrong on an inner dimension with a stride."""
    rows = ROWS["ragged"]
    plain = Tensors.random(len(rows), len(rows))
    strided = Tensors(*(x.transpose(0, 2).contiguous().transpose(0, 2) for x in plain))
    plan = Plan.build(rows, rows, AttentionMask(), heads=4)
    assert_close(run(strided, plan, backend), run(plain, plan, backend))


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((5, 4, 16), (5, 3, 16), (5, 3, 16), "4 query heads cannot share 3"),
        ((5, 4, 16), (5, 2, 8), (5, 2, 8), "attention wants q"),
        ((5, 4, 16), (5, 2, 16), (4, 2, 16), "attention wants q"),
        ((6, 4, 16), (5, 2, 16), (5, 2, 16), "the plan is for 5 queries"),
        ((5, 64), (5, 2, 16), (5, 2, 16), "attention wants q"),
        ((5, 4, 16), (5, 0, 16), (5, 0, 16), "at least one head"),
        ((5, 4, 0), (5, 2, 0), (5, 2, 0), "at least one head"),
    ],
)
def test_bad_shapes_are_refused(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    plan = Plan.build(Rows.packed([5]), Rows.packed([5]), AttentionMask(), heads=4)
    with pytest.raises(ValueError, match=message):
        attention_forward(torch.zeros(q), torch.zeros(k), torch.zeros(v), plan, backend="reference")


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("window", [None, 9])
def test_autograd_does_not_record_attention(backend: str, window: int | None) -> None:
    """Its gradient would be wrong: torch's operator has none for its log-sum-exp."""
    rows = Rows.packed([96])
    t = Tensors.random(96, 96, (2, 1))
    plan = Plan.build(rows, rows, AttentionMask(window=window), heads=2)
    out, lse = attention_forward(t.q.requires_grad_(), t.k, t.v, plan, backend=backend)
    assert not out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", examples(Masked), ids=str)
def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(mechanism: Mechanism, backend: str) -> None:
    """The two facts that every strategy that moves keys relies on."""
    rows = Rows.packed([30, 60, 5], padding=4)
    tensors = Tensors.random(len(rows), len(rows), (8, 2))
    attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
    # Three parts; the queries of the first document see nothing of the last.
    parts = [torch.arange(0, 41, 2), torch.arange(1, 41, 2), torch.arange(41, len(rows))]
    plan, *plans = (
        Plan.build(rows, keys, attention_mask, heads=8, selection=selection, shortest_run=8)
        for keys in (rows, *(rows.take(part) for part in parts))
    )
    assert_close(run_parts(tensors, parts, plans, backend), run(tensors, plan, backend))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mechanism", examples(Routed), ids=str)
def test_batches_are_split_over_threads(mechanism: Mechanism, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run on one thread; the number only changes how the batches of a selection are split.
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in (ROWS["ragged"], ROWS["strided"]):
        tensors = Tensors.random(len(rows), len(rows), (8, 2), (16, 8))
        attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
        check(tensors, rows, rows, attention_mask, "cpu", selection)


@pytest.mark.parametrize("backend", ABLE)
def test_sums_of_parts_are_float32_for_half_inputs(backend: str) -> None:
    """A query meets its keys in dozens of parts: in bfloat16 their sum would drown in rounding."""
    rows = Rows.packed([700])
    tensors = Tensors.random(len(rows), len(rows), (2, 1), dtype=torch.bfloat16)
    plan = Plan.build(rows, rows, AttentionMask(window=600), heads=2)
    out, _, *gradients = run(tensors, plan, backend)
    for x in (out, *gradients):
        assert x.dtype == torch.float32
        assert (x != x.bfloat16().float()).float().mean() > 0.1


@pytest.mark.parametrize("heads", [(8, 1), (1, 1)])
@pytest.mark.parametrize("backend", ABLE)
def test_half_precision_gradients_do_not_get_worse_with_length(backend: str, heads: tuple[int, int]) -> None:
    """One document of 2,048 tokens: dk and dv are sums of thousands of products, as exact as two roundings allow."""
    rows = Rows.packed([2048])
    half = Tensors.random(2048, 2048, heads, dtype=torch.bfloat16)
    full = Tensors(*(x.float() for x in half))
    plan = Plan.build(rows, rows, AttentionMask(), heads=heads[0])
    of_half, of_full = (run(tensors, plan, backend)[2:] for tensors in (half, full))
    for name, got, expected in zip(("dq", "dk", "dv"), of_half, of_full, strict=True):
        # bfloat16 rounds to 2^-9: out once before the backward pass, the gradient once after it.
        assert rms_error(got, expected) < 3e-3, name
