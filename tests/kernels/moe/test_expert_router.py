"""Routers against their formulas, token by token in plain Python."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.moe.expert_router import ExpertRouter
from tests.support.mechanisms import normal

ROUTERS = {
    "Mixtral": ExpertRouter(experts=8, per_token=2),
    "Switch": ExpertRouter(experts=6, per_token=1, normalized=False),
    "all": ExpertRouter(experts=4, per_token=4, normalized=False, scale=2.0),
    "DeepSeek-V3": ExpertRouter(experts=16, per_token=4, score="sigmoid", scale=2.5, groups=4, groups_per_token=2),
    "DeepSeek-V3, the best two of a group": ExpertRouter(
        experts=16, per_token=4, score="sigmoid", groups=4, groups_per_token=3, group_score_top_k=2
    ),
    "best of a group": ExpertRouter(experts=16, per_token=6, groups=4, groups_per_token=3, group_score_top_k=1),
    "all of a group": ExpertRouter(experts=12, per_token=2, groups=4, groups_per_token=2, group_score_top_k=3),
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
    counted = router.group_score_top_k or max(router.per_token // router.groups_per_token, 1)
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


# Experts of a token, groups, groups of a token.
GROUPS = [(8, 8, 4), (8, 8, 2), (4, 8, 4), (3, 4, 2), (6, 8, 3)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("per_token", "groups", "groups_per_token"), GROUPS)
def test_groups_are_those_of_deepseek(per_token: int, groups: int, groups_per_token: int) -> None:
    """By transformers: V3's router with the best two of a group, and V2's with the best one."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    settings = {
        "num_experts": 64, "num_local_experts": 64, "hidden_size": 64, "num_experts_per_tok": per_token,
        "n_group": groups, "topk_group": groups_per_token, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "topk_method": "group_limited_greedy",
    }  # fmt: skip
    ours = ExpertRouter(experts=64, per_token=per_token, scale=2.5, groups=groups, groups_per_token=groups_per_token)
    logits, bias = (x.float() for x in normal((400, 64), (64,)))
    pairs: list[tuple[Any, ExpertRouter, Tensor]] = [
        (DeepseekV3TopkRouter, replace(ours, score="sigmoid", group_score_top_k=2), 0.1 * bias),
        (DeepseekV2TopkRouter, replace(ours, normalized=False, group_score_top_k=1), torch.zeros(64)),
    ]
    for theirs, router, of_choice in pairs:
        reference = theirs(SimpleNamespace(**settings))
        # The identity makes tokens logits; V2 has no bias.
        reference.load_state_dict({"weight": torch.eye(64), "e_score_correction_bias": of_choice}, strict=False)
        _, weights, chosen = reference(logits)
        scores = router.scores(logits)
        found = router.choose(scores, of_choice)
        assert torch.equal(found.sort(dim=1).values, chosen.sort(dim=1).values)
        expected = weights.gather(1, chosen.argsort(dim=1))
        assert torch.allclose(router.weights(scores, found).gather(1, found.argsort(dim=1)), expected, rtol=1e-6)


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
        ({"groups": 4, "group_score_top_k": 3}, "group_score_top_k=3 must be from 0 to 2, the experts of a group"),
        ({"group_score_top_k": -1}, "group_score_top_k=-1 must be from 0 to 8"),
        ({"groups": 4, "per_token": 3}, "groups_per_token=1 groups of 2 experts are fewer than per_token=3"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertRouter(**{"experts": 8, "per_token": 2} | wrong)  # pyright: ignore[reportArgumentType]
