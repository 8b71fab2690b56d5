"""NAtS: who sees whom, token by token, and what its router learns, against autograd through the relaxed mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.attention import attention_forward
from farspan.kernels.kinds.kv_lifetime import LifetimeRouting, TypeGradient
from farspan.kernels.lifetimes import gradient as type_gradient
from farspan.kernels.lifetimes.lifetimes import GLOBAL, LOCAL, SLIDING, Lifetimes, chosen_types
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.planner import Heads, HeadShare
from farspan.kernels.planning.plan import Plan
from farspan.kernels.sequence_attention import SequencePlanner, plan_sequence_attention
from tests.support import lifetimes as truth
from tests.support.oracle import relative_error

PACKED = Rows.packed([1, 2, 3, 40, 33, 4], padding=6)
SHUFFLED = PACKED.take(torch.randperm(len(PACKED), generator=torch.Generator().manual_seed(0)))
HEADS = Heads(query=4, kv=2)


def random_logits(rows: Rows, *, seed: int = 0) -> Tensor:
    """Logits of three KV heads: many global tokens, few of them, and many ties."""
    logits = torch.randn(len(rows), 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, 1, 0] -= 1.5
    logits[:, 2] = logits[:, 2].round()
    return logits


def test_lifetimes_by_hand() -> None:
    """The first two are a document with nothing between its ends; of the second the ends are global by force."""
    kinds = [LOCAL, SLIDING, SLIDING, LOCAL, SLIDING, LOCAL, GLOBAL, LOCAL, LOCAL, SLIDING, LOCAL]
    rows = Rows.packed([2, 9], padding=1)
    types = torch.tensor([*kinds, LOCAL], dtype=torch.int8)[:, None]
    lifetimes = Lifetimes.of(types, rows, window=2)
    assert lifetimes.types[0].tolist() == [0, 0, 0, 1, 2, 1, 0, 1, 1, 2, 0, 0]
    assert lifetimes.last[0].tolist() == [1, 1, 8, 4, 4, 4, 8, 8, 8, 8, 8, -1]
    assert lifetimes.following[0].tolist() == [1, 1, 4, 4, 4, 4, 8, 8, 8, 8, 8, -1]
    assert lifetimes.beyond[0].tolist() == [1, 1, 8, 8, 8, 8, 8, 8, 8, 8, 8, -1]
    assert lifetimes.last.dtype == torch.int32


@pytest.mark.parametrize("rows", [PACKED, SHUFFLED], ids=["packed", "shuffled"])
@pytest.mark.parametrize("window", [1, 5, 2**31 - 1])
def test_who_sees_whom(rows: Rows, window: int) -> None:
    logits, mechanism = random_logits(rows), NAtS(window=window)
    lifetimes = Lifetimes.of(chosen_types(logits), rows, mechanism.window)
    plan = Plan.build(rows, rows, mechanism.attention_mask(), heads=6).with_lifetimes(lifetimes.last)
    expected = truth.visible(logits, rows, window)
    assert lifetimes.types.tolist() == truth.types(logits, rows)
    assert torch.equal(plan.mask(), expected.repeat_interleave(2, dim=0))
    assert lifetimes.pairs(rows) == int(expected.sum()) // 3
    part = torch.tensor([5, -1, 30, 2, 17])
    some = Plan.build(rows, rows.take(part), mechanism.attention_mask(), heads=3).with_lifetimes(
        lifetimes.take(part).last
    )
    assert torch.equal(some.mask(), expected[:, :, part] & (part >= 0))


def test_pairs_of_a_router_that_knows_nothing() -> None:
    """A third of the keys is global, and local ones live for some three tokens."""
    rows = Rows.packed([3000])
    assert 0.3 < NAtS(window=4).unmasked_pairs(rows) / (3000 * 3001 / 2) < 0.37


def draw(rows: Rows, heads: Heads, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((heads.query, 16), (heads.kv, 16), (heads.kv, 8), (heads.query, 8))
    return [torch.randn(len(rows), *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def learning(mechanism: NAtS, tensors: list[Tensor], logits: Tensor, rows: Rows, parts: list[tuple[Tensor, Tensor]]):
    """Return what is learned of the types by these (queries, keys), each a part of the rows."""
    q, k, v, dout = tensors
    plan = Plan.build(rows, rows, mechanism.attention_mask(), heads=q.shape[1])
    planner = SequencePlanner.of(rows, HeadShare.all(Heads(query=q.shape[1], kv=k.shape[1])), backend="reference")
    lifetimes = Lifetimes.of(chosen_types(logits), rows, mechanism.window)
    out = attention_forward(q, k, v, plan.with_lifetimes(lifetimes.last), backend="reference")[0]
    lse = attention_forward(q, k, v, plan, backend="reference")[1]
    learned = TypeGradient(LifetimeRouting(mechanism, planner), lifetimes, logits, lse)
    for mine, keys in parts:
        of_mine = LifetimeRouting(mechanism, replace(planner, tokens=mine))
        of_part = TypeGradient(of_mine, lifetimes, logits[mine], lse[mine])
        between = Plan.build(rows.take(mine), rows.take(keys), mechanism.attention_mask(), heads=q.shape[1])
        of_part.add(dout[mine], q[mine], k[keys], v[keys], out[mine], plan=between, tokens=keys)
        learned.sums = sums_of(of_part) if learned.sums is None else learned.sums + sums_of(of_part)
    return learned


def sums_of(learned: TypeGradient) -> Tensor:
    assert learned.sums is not None
    return learned.sums


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
    learned = learning(mechanism, tensors, logits, rows, everything)
    got = type_gradient.type_gradient(sums_of(learned), learned.lifetimes, rows)

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
    whole = learning(mechanism, tensors, logits, PACKED, [(torch.arange(count), torch.arange(count))])
    mine = [torch.arange(0, count, 2), torch.arange(1, count, 2)]
    keys = [torch.arange(0, 30), torch.arange(30, 41), torch.arange(41, count)]
    parts = learning(mechanism, tensors, logits, PACKED, [(a, b) for a in mine for b in keys])
    assert relative_error(sums_of(parts), sums_of(whole)) < 1e-12
    assert relative_error(parts.gradients()[0], whole.gradients()[0]) < 1e-12
    assert whole.gradients()[0].abs().max() > 0.1


def test_query_heads_of_a_kv_head_can_be_held_apart() -> None:
    """The gradients of routing add up; the penalty is not counted once for each owner."""
    heads, mechanism = Heads(query=8, kv=1), NAtS(window=3, penalty=0.5)
    q, k, v, dout = draw(PACKED, heads)
    logits = random_logits(PACKED)[:, :1]

    def gradient(head_range: range) -> Tensor:
        attention = plan_sequence_attention(mechanism, PACKED, heads, head_range, backend="reference")
        mine = slice(head_range.start, head_range.stop)
        return attention.backward(dout[:, mine], attention.forward(q[:, mine], k, v, logits)[1])[3]

    for size in (1, 2):
        apart = sum(gradient(range(first, first + size)) for first in range(0, 8, size))
        assert isinstance(apart, Tensor)
        assert relative_error(apart, gradient(range(8))) < 1e-12


def test_penalties_by_hand() -> None:
    """A document of 8 with global tokens at 0, 3 and 7 and local ones at 1 and 5."""
    types = torch.tensor([2, 1, 2, 0, 2, 1, 2, 1], dtype=torch.int8)[:, None]
    rows, mechanism = Rows.packed([8]), NAtS(penalty=8.0)
    found = mechanism.penalties(Lifetimes.of(types, rows, mechanism.window), rows)[:, 0]
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
    attention = plan_sequence_attention(mechanism, rows, HEADS, range(4), backend="cpu")
    gradient = attention.backward(dout, attention.forward(q, k, v, logits)[1])[3]
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
