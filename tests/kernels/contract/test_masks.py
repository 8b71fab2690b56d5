"""Attention of rows to rows under a mask, on every backend, against the oracle in float64."""

import pytest
import torch

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.backend import BACKENDS
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.kernels.mechanisms.spans import Spans
from farspan.kernels.planning.plan import Plan
from tests.support import oracle
from tests.support.attention_cases import ABLE, ATTENTION_MASKS, ROWS, Tensors, check, mask_and_selection, mask_of, run

# One mechanism for each way that a plan hides keys: a mask, one per head, a grid, selections by row and by tile.
HIDING = [Dense(), Spans.examples()[0], Neighborhood.examples()[0], MoBA(block=4, top_k=2), BlockSparse(block=8)]


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
@pytest.mark.parametrize("backend", ABLE)
def test_equals_the_formula(attention_mask: AttentionMask, backend: str) -> None:
    for rows in ROWS.values():
        for keys in (rows, ROWS["strided"]):
            tensors = Tensors.random(len(rows), len(keys), (4, 2), 16, 16, torch.float64)
            check(tensors, rows, keys, attention_mask, backend)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (40, 40), (96, 64), (64, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("backend", ABLE)
def test_head_sizes(backend: str, head_dim: int, value_dim: int) -> None:
    rows = ROWS["ragged"]
    tensors = Tensors.random(len(rows), len(rows), (4, 2), head_dim, value_dim, torch.float64)
    check(tensors, rows, rows, AttentionMask(), backend)


@pytest.mark.parametrize("order", ["runs", "irregular"])
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", HIDING, ids=str)
def test_nothing_leaks_from_hidden_keys(mechanism: Mechanism, backend: str, order: str) -> None:
    """d out_t / d (k, v)_s is exactly 0 wherever s is hidden from t, even if its score would exceed all others."""
    rows = Rows.packed([20, 23])
    if order == "irregular":
        rows = rows.take(torch.randperm(43, generator=torch.Generator().manual_seed(0)))
    tensors = Tensors.random(len(rows), len(rows), (8, 1), 16, 16, torch.float64)
    attention_mask, selection = mask_and_selection(mechanism, tensors, rows)
    plan = Plan.build(rows, rows, attention_mask, heads=8, selection=selection, shortest_run=8)
    out, lse = attention_forward(tensors.q, tensors.k, tensors.v, plan, backend=backend)
    # k has a single head: keys visible in any query head are not hidden.
    mask = mask_of(rows, rows, attention_mask, 8, selection).any(dim=0)
    for t in (0, 7, 19, 20, 30, 42):
        hidden = [s for s in range(len(rows)) if not mask[t, s]]
        k, v = tensors.k.clone(), tensors.v.clone()
        k[hidden] *= 1e6
        v[hidden] -= 50.0
        changed, _ = attention_forward(tensors.q, k, v, plan, backend=backend)
        assert torch.equal(changed[t], out[t])
        only_t = torch.zeros_like(out)
        only_t[t] = tensors.dout[t]
        _, dk, dv = attention_backward(only_t, tensors.q, tensors.k, tensors.v, out, lse, plan, backend=backend)
        assert not dk[hidden].any()
        assert not dv[hidden].any()


@pytest.mark.parametrize("backend", ["attention_forward", *ABLE])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_at_all(backend: str, queries: int, keys: int) -> None:
    """Through `attention_forward`, which spares backends empty plans, and by each backend itself."""
    t = Tensors.random(queries, keys, (4, 2), 16, 16, torch.float32)
    plan = Plan.build(Rows.packed([queries]), Rows.packed([keys]), AttentionMask(), heads=4)
    if backend == "attention_forward":
        out, lse, *gradients = run(t, plan, "reference")
    else:
        out, lse = BACKENDS.get(backend).forward(t.q, t.k, t.v, plan)
        gradients = list(BACKENDS.get(backend).backward(t.dout, t.q, t.k, t.v, out, lse, plan))
    assert out.shape == (queries, 4, 16)
    assert not out.any()
    assert lse.isneginf().all()
    assert not any(gradient.any() for gradient in gradients)
    assert [x.shape for x in gradients] == [x.shape for x in (t.q, t.k, t.v)]


@pytest.mark.parametrize("backend", ABLE)
def test_inputs_need_not_be_contiguous(backend: str) -> None:
    """torch's CPU operator is silently wrong on an inner dimension with a stride."""
    rows = ROWS["ragged"]
    plain = Tensors.random(len(rows), len(rows), (4, 2), 16, 16, torch.float64)
    strided = Tensors(*(x.transpose(0, 2).contiguous().transpose(0, 2) for x in vars(plain).values()))
    plan = Plan.build(rows, rows, AttentionMask(), heads=4)
    for a, b in zip(run(plain, plan, backend), run(strided, plan, backend), strict=True):
        assert oracle.relative_error(b, a) <= oracle.RELATIVE_TOLERANCE[torch.float64]


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
    t = Tensors.random(96, 96, (2, 1), 16, 16, torch.float64)
    plan = Plan.build(rows, rows, AttentionMask(window=window), heads=2)
    out, lse = attention_forward(t.q.requires_grad_(), t.k, t.v, plan, backend=backend)
    assert not out.requires_grad
    assert not lse.requires_grad
