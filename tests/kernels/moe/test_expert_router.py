"""Routers against their formulas, token by token in plain Python."""

import math

import pytest
import torch

from farspan.kernels.moe.expert_router import ExpertRouter
from tests.support.mechanisms import normal

ROUTERS = {
    "Mixtral": ExpertRouter(experts=8, per_token=2),
    "Switch": ExpertRouter(experts=6, per_token=1, normalized=False),
    "all": ExpertRouter(experts=4, per_token=4, normalized=False, scale=2.0),
    "DeepSeek-V3": ExpertRouter(experts=16, per_token=4, score="sigmoid", scale=2.5, groups=4, groups_per_token=2),
    "one of each group": ExpertRouter(experts=12, per_token=3, score="sigmoid", groups=3, groups_per_token=3),
    "softmax in groups": ExpertRouter(experts=12, per_token=2, normalized=False, groups=6, groups_per_token=2),
}


def by_hand(router: ExpertRouter, logits: list[float], bias: list[float]) -> tuple[list[int], list[float]]:
    """The experts of one token, best first, and their weights."""
    if router.score == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    ranked = [score + b for score, b in zip(scores, bias, strict=True)]
    size = router.experts // router.groups
    counted = max(router.per_token // router.groups_per_token, 1)
    value = [sum(sorted(ranked[g * size : (g + 1) * size])[-counted:]) for g in range(router.groups)]
    groups = sorted(range(router.groups), key=lambda g: (-value[g], g))[: router.groups_per_token]
    able = [e for e in range(router.experts) if e // size in groups]
    chosen = sorted(able, key=lambda e: (-ranked[e], e))[: router.per_token]
    weights = [scores[e] for e in chosen]
    if router.normalized:
        weights = [w / sum(weights) for w in weights]
    return chosen, [w * router.scale for w in weights]


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_experts_and_weights(router: ExpertRouter) -> None:
    logits, bias = normal((200, router.experts), (router.experts,))
    scores, bias = router.scores(logits), 0.2 * bias.float()
    chosen = router.choose(scores, bias)
    weights = router.weights(scores, chosen)
    for t in range(len(logits)):
        expected = by_hand(router, logits[t].tolist(), bias.tolist())
        assert chosen[t].tolist() == expected[0]
        assert weights[t].tolist() == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_the_lower_number_wins_a_tie(router: ExpertRouter) -> None:
    chosen = router.choose(router.scores(torch.zeros(1, router.experts)), torch.zeros(router.experts))
    assert chosen[0].tolist() == list(range(router.per_token))


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_that_are_not_finite_choose_experts_all_the_same(router: ExpertRouter, sign: float) -> None:
    logits = torch.randn(6, router.experts)
    # The sign of a NaN, which depends on the device, is a bit that sorting sees.
    logits[::2] = torch.full((), math.nan).copysign(torch.tensor(sign))
    logits[1, 2] = math.nan
    chosen = router.choose(router.scores(logits).copysign(torch.tensor(sign)), torch.zeros(router.experts))
    assert ((chosen >= 0) & (chosen < router.experts)).all()
    assert all(len(set(of_token)) == router.per_token for of_token in chosen.tolist())


def test_the_bias_does_not_weigh() -> None:
    router = ExpertRouter(experts=4, per_token=1, score="sigmoid", normalized=False)
    scores = router.scores(torch.tensor([[3.0, 0.0, 0.0, 0.0]]))
    chosen = router.choose(scores, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert chosen.tolist() == [[2]]
    assert router.weights(scores, chosen).tolist() == [[0.5]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_shares_add_up_to_one_even_far_out(score: str) -> None:
    router = ExpertRouter(experts=5, per_token=2, score=score)  # pyright: ignore[reportArgumentType]
    assert router.shares(router.scores(torch.randn(30, 5))).sum(-1).tolist() == pytest.approx([1.0] * 30)
    # All sigmoids are 0 in float32.
    far = torch.full((1, 5), -200.0, requires_grad=True)
    scores = router.scores(far)
    weights = router.weights(scores, router.choose(scores, torch.zeros(5)))
    assert torch.autograd.grad(weights.sum() + router.shares(scores).sum(), far)[0].isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"per_token": 9}, "per_token=9 must be from 1 to experts=8"),
        ({"groups": 3}, "groups=3 must divide experts=8"),
        ({"groups": 4, "groups_per_token": 5}, "groups_per_token=5 must be from 1 to groups=4"),
        ({"groups": 4, "per_token": 3}, "groups_per_token=1 groups of 2 experts are fewer than per_token=3"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertRouter(**{"experts": 8, "per_token": 2} | wrong)  # pyright: ignore[reportArgumentType]
