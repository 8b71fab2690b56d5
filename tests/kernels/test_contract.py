"""What attention of rows to rows owes on every backend and in every dtype, against the oracle in float64.

Of the mechanisms, those that a plan describes; `test_sequence_attention.py` has all of them.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.backend import BACKENDS
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.planning.plan import Plan
from tests.support import oracle
from tests.support.sequence_shards import select

CPU = torch.device("cpu")
DTYPES = list(oracle.RELATIVE_TOLERANCE)
ABLE = [name for name in BACKENDS if BACKENDS.get(name).unsupported_reason(CPU) is None]
EXAMPLES = [
    pytest.param(example, id=str(example))
    for name in MECHANISMS
    for example in MECHANISMS.get(name).examples()
    if isinstance(example, Masked)
]
# Visibilities that no mechanism uses are held to the same contract.
ATTENTION_MASKS = [
    *(AttentionMask(causal=causal, window=window) for causal in (True, False) for window in (1, 7, 40)),
    AttentionMask(window=(3, 40, 3, 9), sinks=2),
    AttentionMask(causal=False, window=(1, 2, 90, 1)),
    AttentionMask(
        causal=False,
        neighborhood=Neighborhood(dimensions=(Dimension(length=5, window=3), Dimension(length=8, window=4, stride=2))),
    ),
]

ROWS = {
    "one": Rows.packed([77]),
    "ragged": Rows.packed([1, 40, 3, 33], padding=5),
    "padding_only": Rows.packed([], padding=9),
    "shuffled": Rows.packed([50, 30], padding=3).take(torch.randperm(83, generator=torch.Generator().manual_seed(0))),
    "strided": Rows.packed([160]).take(torch.arange(1, 160, 2)),
}
HEADS = [(8, 8), (8, 2), (8, 1)]


@dataclass(frozen=True)
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def random(
        queries: int, keys: int, heads: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype
    ) -> Any:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return Tensors(
            q=draw(queries, heads[0], head_dim),
            k=draw(keys, heads[1], head_dim),
            v=draw(keys, heads[1], value_dim),
            dout=draw(queries, heads[0], value_dim),
        )


def run(tensors: Tensors, plan: Plan, backend: str) -> list[Tensor]:
    out, lse = attention_forward(tensors.q, tensors.k, tensors.v, plan, backend=backend)
    assert lse.dtype == accumulation_dtype(tensors.q.dtype)
    assert out.dtype in (tensors.q.dtype, lse.dtype)
    gradients = attention_backward(
        tensors.dout, tensors.q, tensors.k, tensors.v, out.to(tensors.q.dtype), lse, plan, backend=backend
    )
    return [out, lse, *gradients]


def expect(tensors: Tensors, mask: Tensor) -> list[Tensor]:
    q, k, v = (x.double().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    out, lse = oracle.attention(q, k, v, mask)
    gradients = torch.autograd.grad(out, (q, k, v), tensors.dout.double(), allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *gradients]


def check(
    tensors: Tensors,
    queries: Rows,
    keys: Rows,
    attention_mask: AttentionMask,
    backend: str,
    selection: BlockSelection | None = None,
) -> None:
    heads = tensors.q.shape[1]
    plan = Plan.build(queries, keys, attention_mask, heads=heads, selection=selection, shortest_run=8)
    got = run(tensors, plan, backend)
    expected = expect(tensors, mask_of(queries, keys, attention_mask, heads, selection))
    tolerance = oracle.RELATIVE_TOLERANCE[tensors.q.dtype]
    errors = {
        name: oracle.relative_error(a, b)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True)
    }
    assert max(errors.values()) <= tolerance, errors


def mask_of(
    queries: Rows, keys: Rows, attention_mask: AttentionMask, heads: int, selection: BlockSelection | None
) -> Tensor:
    mask = oracle.visible_mask(queries, keys, attention_mask, heads)
    return mask if selection is None else mask & oracle.selected_mask(selection, keys, heads)


def shown(mechanism: Mechanism, tensors: Tensors, rows: Rows) -> tuple[AttentionMask, BlockSelection | None]:
    """What a mechanism lets the rows of one whole sequence see."""
    assert isinstance(mechanism, Masked)
    if not isinstance(mechanism, Routed):
        return mechanism.attention_mask(), None
    return mechanism.attention_mask(), select(mechanism, tensors.q, tensors.k, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_mechanism_equals_the_formula(mechanism: Mechanism, backend: str, dtype: torch.dtype) -> None:
    for rows in ROWS.values():
        for heads in HEADS:
            tensors = Tensors.random(len(rows), len(rows), heads, 16, 8, dtype)
            attention_mask, selection = shown(mechanism, tensors, rows)
            check(tensors, rows, rows, attention_mask, backend, selection)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_tasks_are_dealt_to_threads(mechanism: Mechanism, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests run on one thread; all that the number changes is how tasks are cut.
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in (ROWS["ragged"], ROWS["strided"]):
        tensors = Tensors.random(len(rows), len(rows), (8, 2), 16, 8, torch.float64)
        attention_mask, selection = shown(mechanism, tensors, rows)
        check(tensors, rows, rows, attention_mask, "cpu", selection)


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
@pytest.mark.parametrize("backend", ABLE)
def test_visibility_equals_the_formula(attention_mask: AttentionMask, backend: str) -> None:
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


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_parts_over_disjoint_keys_merge_and_their_gradients_add_up(mechanism: Mechanism, backend: str) -> None:
    """The two facts that every strategy stands on."""
    rows = Rows.packed([30, 60, 5], padding=4)
    tensors = Tensors.random(len(rows), len(rows), (8, 2), 16, 16, torch.float64)
    attention_mask, selection = shown(mechanism, tensors, rows)
    whole = run(tensors, Plan.build(rows, rows, attention_mask, heads=8, selection=selection), backend)
    # Three parts; the queries of the first document see nothing of the last.
    parts = [torch.arange(0, 41, 2), torch.arange(1, 41, 2), torch.arange(41, len(rows))]
    plans = [
        Plan.build(rows, rows.take(part), attention_mask, heads=8, selection=selection, shortest_run=8)
        for part in parts
    ]
    out, lse = empty_partial(len(rows), 8, 16, like=tensors.q)
    for part, plan in zip(parts, plans, strict=True):
        merge_(out, lse, *attention_forward(tensors.q, tensors.k[part], tensors.v[part], plan, backend=backend))
    dq = torch.zeros_like(tensors.q)
    dk, dv = torch.zeros_like(tensors.k), torch.zeros_like(tensors.v)
    for part, plan in zip(parts, plans, strict=True):
        mine = attention_backward(
            tensors.dout, tensors.q, tensors.k[part], tensors.v[part], out, lse, plan, backend=backend
        )
        dq += mine[0]
        dk[part], dv[part] = mine[1], mine[2]
    for got, expected in zip((out, lse, dq, dk, dv), whole, strict=True):
        assert oracle.relative_error(got, expected) <= oracle.RELATIVE_TOLERANCE[torch.float64]


@pytest.mark.parametrize("order", ["runs", "irregular"])
@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_nothing_leaks_from_later_tokens_or_other_documents(mechanism: Mechanism, backend: str, order: str) -> None:
    """d out_t / d (k, v)_s is exactly 0 wherever s is not visible to t, even if its score would tower over all."""
    rows = Rows.packed([20, 23])
    if order == "irregular":
        rows = rows.take(torch.randperm(43, generator=torch.Generator().manual_seed(0)))
    tensors = Tensors.random(len(rows), len(rows), (8, 1), 16, 16, torch.float64)
    attention_mask, selection = shown(mechanism, tensors, rows)
    plan = Plan.build(rows, rows, attention_mask, heads=8, selection=selection, shortest_run=8)
    out, _ = attention_forward(tensors.q, tensors.k, tensors.v, plan, backend=backend)
    # k has a single head: what one of the query heads sees is not hidden.
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
        lse = attention_forward(tensors.q, tensors.k, tensors.v, plan, backend=backend)[1]
        _, dk, dv = attention_backward(only_t, tensors.q, tensors.k, tensors.v, out, lse, plan, backend=backend)
        assert not dk[hidden].any()
        assert not dv[hidden].any()


@pytest.mark.parametrize("backend", ["attend", *ABLE])
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_at_all(backend: str, queries: int, keys: int) -> None:
    """Through `attention_forward`, which does not bother a backend with nothing, and by each backend itself."""
    t = Tensors.random(queries, keys, (4, 2), 16, 16, torch.float32)
    plan = Plan.build(Rows.packed([queries]), Rows.packed([keys]), AttentionMask(), heads=4)
    if backend == "attend":
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
        ((5, 4, 16), (5, 0, 16), (5, 0, 16), "attention wants at least one head"),
        ((5, 4, 0), (5, 2, 0), (5, 2, 0), "attention wants at least one head"),
    ],
)
def test_bad_shapes_are_refused(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    plan = Plan.build(Rows.packed([5]), Rows.packed([5]), AttentionMask(), heads=4)
    with pytest.raises(ValueError, match=message):
        attention_forward(torch.zeros(q), torch.zeros(k), torch.zeros(v), plan, backend="reference")


@pytest.mark.parametrize("backend", ABLE)
def test_sums_of_parts_are_float32_for_half_inputs(backend: str) -> None:
    """A query meets its keys in dozens of parts: sums kept in bfloat16 would drown in their rounding."""
    rows = Rows.packed([700])
    tensors = Tensors.random(len(rows), len(rows), (2, 1), 16, 16, torch.bfloat16)
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
    half = Tensors.random(2048, 2048, heads, 16, 16, torch.bfloat16)
    full = Tensors(*(x.float() for x in vars(half).values()))
    plan = Plan.build(rows, rows, AttentionMask(), heads=heads[0])
    of_half, of_full = (run(tensors, plan, backend)[2:] for tensors in (half, full))
    for name, got, expected in zip(("dq", "dk", "dv"), of_half, of_full, strict=True):
        # bfloat16 rounds to 2^-9: out once before the backward pass, the gradient once after it.
        assert oracle.rms_error(got, expected) < 3e-3, name


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("window", [None, 9])
def test_autograd_does_not_look_into_attend(backend: str, window: int | None) -> None:
    """What it would find there is wrong: torch's operator gives no gradient for its log-sum-exp."""
    rows = Rows.packed([96])
    tensors = Tensors.random(96, 96, (2, 1), 16, 16, torch.float64)
    q = tensors.q.requires_grad_()
    out, lse = attention_forward(
        q, tensors.k, tensors.v, Plan.build(rows, rows, AttentionMask(window=window), heads=2), backend=backend
    )
    assert not out.requires_grad
    assert not lse.requires_grad
