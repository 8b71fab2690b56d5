"""NAtS: who sees whom, token by token, and what its router learns, against autograd through the relaxed mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.attention import attention_forward
from farspan.kernels.kinds.kv_lifetime import LifetimeRouting, TypeGradient
from farspan.kernels.lifetimes import gradient as type_gradient
from farspan.kernels.lifetimes.lifetimes import GLOBAL, LOCAL, SLIDING, DocumentOrder, Lifetimes, chosen_types
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.planner import Heads, HeadShare
from farspan.kernels.planning.plan import Plan
from farspan.kernels.ragged import take_or
from farspan.kernels.sequence_attention import SequencePlanner
from tests.support import lifetimes as truth
from tests.support.attention_cases import Tensors
from tests.support.mechanisms import attend, normal
from tests.support.oracle import assert_close, relative_error

PACKED = Rows.packed([1, 2, 3, 40, 33, 4], padding=6)
SHUFFLED = PACKED.take(torch.randperm(len(PACKED), generator=torch.Generator().manual_seed(0)))
HEADS = Heads(query=4, kv=2)


def random_logits(rows: Rows) -> Tensor:
    """Logits of three KV heads: many global tokens, few of them, and many ties."""
    (logits,) = normal((len(rows), 3, 3))
    logits[:, 1, 0] -= 1.5
    logits[:, 2] = logits[:, 2].round()
    return logits


def test_lifetimes_by_hand() -> None:
    """The first two are a document with nothing between its ends; of the second the ends are global by force."""
    kinds = [LOCAL, SLIDING, SLIDING, LOCAL, SLIDING, LOCAL, GLOBAL, LOCAL, LOCAL, SLIDING, LOCAL]
    rows = Rows.packed([2, 9], padding=1)
    types = torch.tensor([*kinds, LOCAL], dtype=torch.int8)[:, None]
    lifetimes = Lifetimes.of(types, DocumentOrder.of(rows), window=2)
    assert lifetimes.types[0].tolist() == [0, 0, 0, 1, 2, 1, 0, 1, 1, 2, 0, 0]
    assert lifetimes.last[0].tolist() == [1, 1, 8, 4, 4, 4, 8, 8, 8, 8, 8, -1]
    assert lifetimes.following[0].tolist() == [1, 1, 4, 4, 4, 4, 8, 8, 8, 8, 8, -1]
    assert lifetimes.beyond[0].tolist() == [1, 1, 8, 8, 8, 8, 8, 8, 8, 8, 8, -1]
    assert lifetimes.last.dtype == torch.int32


@pytest.mark.parametrize("rows", [PACKED, SHUFFLED], ids=["packed", "shuffled"])
@pytest.mark.parametrize("window", [1, 5, 2**31 - 1])
def test_who_sees_whom(rows: Rows, window: int) -> None:
    logits, mechanism = random_logits(rows), NAtS(window=window)
    lifetimes = Lifetimes.of(chosen_types(logits), DocumentOrder.of(rows), mechanism.window)
    plan = Plan.build(rows, rows, mechanism.attention_mask(), heads=6).with_lifetimes(lifetimes.last)
    expected = truth.visible(logits, rows, window)
    assert lifetimes.types.tolist() == truth.types(logits, rows)
    assert torch.equal(plan.mask(), expected.repeat_interleave(2, dim=0))
    assert lifetimes.pairs(rows) == int(expected.sum()) // 3
    part = torch.tensor([5, -1, 30, 2, 17])
    some = Plan.build(rows, rows.take(part), mechanism.attention_mask(), heads=3).with_lifetimes(
        take_or(lifetimes.last, part, -1)
    )
    assert torch.equal(some.mask(), expected[:, :, part] & (part >= 0))


def test_pairs_of_a_router_that_knows_nothing() -> None:
    """A third of the keys is global, and local ones live for some three tokens."""
    rows = Rows.packed([3000])
    assert 0.3 < NAtS(window=4).unmasked_pairs(rows) / (3000 * 3001 / 2) < 0.37


def draw(rows: Rows, heads: Heads, dtype: torch.dtype = torch.float64) -> Tensors:
    return Tensors.random(len(rows), len(rows), (heads.query, heads.kv), (16, 8), dtype)


def learning(
    mechanism: NAtS, tensors: Tensors, logits: Tensor, rows: Rows, parts: list[tuple[Tensor, Tensor]]
) -> tuple[TypeGradient, Tensor]:
    """Return what is learned of the types by these (queries, keys), each a part of the rows, and its sums."""
    q, k, v, dout = tensors
    plan = Plan.build(rows, rows, mechanism.attention_mask(), heads=q.shape[1])
    planner = SequencePlanner.of(rows, HeadShare.all(Heads(query=q.shape[1], kv=k.shape[1])), backend="reference")
    lifetimes = Lifetimes.of(chosen_types(logits), DocumentOrder.of(rows), mechanism.window)
    out = attention_forward(q, k, v, plan.with_lifetimes(lifetimes.last), backend="reference")[0]
    lse = attention_forward(q, k, v, plan, backend="reference")[1]
    learned, sums = TypeGradient(LifetimeRouting(mechanism, planner), lifetimes, logits, lse), []
    for queries, keys in parts:
        of_queries = LifetimeRouting(mechanism, replace(planner, tokens=queries))
        of_part = TypeGradient(of_queries, lifetimes, logits[queries], lse[queries])
        between = Plan.build(rows.take(queries), rows.take(keys), mechanism.attention_mask(), heads=q.shape[1])
        of_part.add(dout[queries], q[queries], k[keys], v[keys], out[queries], plan=between, tokens=keys)
        assert of_part.sums is not None
        sums.append(of_part.sums)
    learned.sums = torch.stack(sums).sum(dim=0)
    return learned, learned.sums


@pytest.mark.parametrize("rows", [PACKED, SHUFFLED], ids=["packed", "shuffled"])
@pytest.mark.parametrize("heads", [Heads(query=3, kv=3), Heads(query=6, kv=3)], ids=["3:3", "6:3"])
@pytest.mark.parametrize("window", [2, 7])
def test_the_gradient_of_types_is_that_of_the_relaxed_mask(
    rows: Rows, heads: Heads, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each of the three numbers of a token, up to what all three have in common, which the softmax drops."""
    monkeypatch.setattr(type_gradient, "TILE_QUERIES", 16)
    monkeypatch.setattr(type_gradient, "SCORES_AT_ONCE", 1)
    logits, mechanism, tensors = random_logits(rows), NAtS(window=window, penalty=0.0), draw(rows, heads)
    everything = [(torch.arange(len(rows)), torch.arange(len(rows)))]
    learned, sums = learning(mechanism, tensors, logits, rows, everything)
    got = type_gradient.type_gradient(sums, learned.lifetimes, DocumentOrder.of(rows))

    t = truth.one_hot_types(logits, rows, 1.0).requires_grad_()
    q, k, v, dout = tensors
    out, _ = truth.attention(q, k, v, t, rows, window)
    (expected,) = torch.autograd.grad((out * dout).sum(), t)
    free = truth.free(rows)
    assert len(truth.documents(rows)) == 6
    for a, b in ((GLOBAL, LOCAL), (GLOBAL, SLIDING)):
        found, right = ((x[free, :, a] - x[free, :, b]) for x in (got, expected))
        assert right.abs().max() > 0.1
        assert relative_error(found, right) < 1e-12


def test_what_is_learnt_from_parts_adds_up() -> None:
    """As chunks of keys meet the queries of each rank: striped, in stretches, and with rows of padding."""
    logits, mechanism, tensors = random_logits(PACKED), NAtS(window=3), draw(PACKED, Heads(query=6, kv=3))
    count = len(PACKED)
    full, full_sums = learning(mechanism, tensors, logits, PACKED, [(torch.arange(count), torch.arange(count))])
    queries = [torch.arange(0, count, 2), torch.arange(1, count, 2)]
    keys = [torch.arange(0, 30), torch.arange(30, 41), torch.arange(41, count)]
    parts, sums = learning(mechanism, tensors, logits, PACKED, [(a, b) for a in queries for b in keys])
    assert_close((sums, parts.gradients()[0]), (full_sums, full.gradients()[0]))
    assert full.gradients()[0].abs().max() > 0.1
    # The logits of padding may be anything, and learn nothing.
    logits[PACKED.document < 0] = torch.nan
    spoiled, _ = learning(mechanism, tensors, logits, PACKED, [(torch.arange(count), torch.arange(count))])
    assert torch.equal(spoiled.gradients()[0], full.gradients()[0])


def test_the_sums_do_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a single query lie at every distance from their keys, also where a key's own sums just end."""
    rows = Rows.packed([90])
    logits, tensors, all_rows = random_logits(rows), draw(rows, Heads(query=6, kv=3)), torch.arange(90)
    _, expected = learning(NAtS(window=2), tensors, logits, rows, [(all_rows, all_rows)])
    monkeypatch.setattr(type_gradient, "TILE_QUERIES", 1)
    monkeypatch.setattr(type_gradient, "SCORES_AT_ONCE", 1)
    assert_close([learning(NAtS(window=2), tensors, logits, rows, [(all_rows, all_rows)])[1]], [expected])


def test_query_heads_of_a_kv_head_can_be_held_apart() -> None:
    """The gradients of routing add up; the penalty is not counted once for each owner."""
    heads, mechanism = Heads(query=8, kv=1), NAtS(window=3, penalty=0.5)
    q, k, v, dout = draw(PACKED, heads)
    logits = random_logits(PACKED)[:, :1]

    def gradient(head_range: range) -> Tensor:
        local = slice(head_range.start, head_range.stop)
        inputs = q[:, local], k, v, logits, dout[:, local]
        return attend(mechanism, PACKED, heads, inputs, head_range=head_range)[-1]

    for size in (1, 2):
        apart = sum(gradient(range(first, first + size)) for first in range(0, 8, size))
        assert isinstance(apart, Tensor)
        assert relative_error(apart, gradient(range(8))) < 1e-12


def test_penalties_by_hand() -> None:
    """A document of 8 with global tokens at 0, 3 and 7 and local ones at 1 and 5."""
    types = torch.tensor([2, 1, 2, 0, 2, 1, 2, 1], dtype=torch.int8)[:, None]
    rows, mechanism = Rows.packed([8]), NAtS(penalty=8.0)
    order = DocumentOrder.of(rows)
    found = mechanism.penalties(Lifetimes.of(types, order, mechanism.window), order)[:, 0]
    assert found[:, GLOBAL].tolist() == [8, 0, 0, 5, 0, 0, 0, 1]
    assert found[:, LOCAL].tolist() == [0, 2, 0, 0, 0, 2, 0, 0]
    assert not found[:, SLIDING].any()


def test_the_ends_of_documents_learn_nothing_and_hidden_scores_do_not_overflow() -> None:
    """A hidden score of 1000 above the visible ones, as exp would have it: infinity."""
    rows, mechanism = PACKED, NAtS(window=1, penalty=1.0)
    q, k, v, dout = draw(rows, HEADS, torch.float32)
    logits = torch.zeros(len(rows), 2, 3)
    logits[..., SLIDING] = 1.0
    q[..., 0], k[10, :, 0] = 100.0, 40.0
    gradient = attend(mechanism, rows, HEADS, (q, k, v, logits, dout), backend="cpu")[-1]
    assert gradient.isfinite().all()
    assert gradient[10].abs().max() > 1e-3
    assert not gradient[~truth.free(rows)].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": float("nan")}, "temperature=nan must be above 0"),
        ({"penalty": -1.0}, "penalty=-1.0 must be at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NAtS(**options)  # pyright: ignore[reportArgumentType]
