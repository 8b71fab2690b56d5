"""Routers of heads against their formulas, token by token in plain Python."""

import math

import pytest
import torch

from farspan.kernels.moe.head_router import AttentionExperts, MixtureOfHeads
from tests.support.mechanisms import normal

HEADS = {
    "paper, one KV head": MixtureOfHeads(kv_heads=1, group=8, shared=2, per_token=3),
    "three groups": MixtureOfHeads(kv_heads=3, group=4, shared=1, per_token=2),
    "none shared": MixtureOfHeads(kv_heads=2, group=4, shared=0, per_token=1),
    "all": MixtureOfHeads(kv_heads=2, group=3, shared=1, per_token=2),
}


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def by_hand(router: MixtureOfHeads, logits: list[float], bias: list[float]) -> dict[int, float]:
    """The gates of the heads that work on one token, by their numbers among all."""
    routed, groups, shared = router.group - router.shared, router.kv_heads, router.shared
    p = softmax(logits[: groups * routed])
    chosen = []
    for group in range(groups):
        candidates = range(group * routed, (group + 1) * routed)
        chosen += sorted(candidates, key=lambda i: (-(p[i] + bias[i]), i))[: router.per_token]
    total, gates = sum(p[i] for i in chosen), {}
    between = [1.0, 1.0]
    if shared:
        of_shared, between = softmax(logits[groups * routed : -2]), [2 * x for x in softmax(logits[-2:])]
        for i, part in enumerate(of_shared):
            gates[i // shared * router.group + i % shared] = between[0] * part * len(of_shared)
    for i in chosen:
        gates[i // routed * router.group + shared + i % routed] = between[1] * len(chosen) * p[i] / total
    return gates


@pytest.mark.parametrize("router", HEADS.values(), ids=HEADS)
def test_mixture_of_heads_by_hand(router: MixtureOfHeads) -> None:
    logits, bias = normal((40, router.logits), (router.choices,))
    logits[5], bias = 0.0, 0.1 * bias
    found = router.choose(logits, bias)
    slots = router.kv_heads * (router.shared + router.per_token)
    assert found.indices.shape == found.gates.shape == (40, slots)
    group_of_slot = torch.arange(slots) // (router.shared + router.per_token)
    assert torch.equal(found.indices // router.group, group_of_slot.expand(40, -1))
    assert torch.allclose(found.shares.sum(1), torch.ones(40, dtype=torch.float64))
    # In float32, as the choice is made.
    rounded_bias = bias.float().double().tolist()
    for token in range(40):
        wanted = by_hand(router, logits[token].tolist(), rounded_bias)
        got = dict(zip(found.indices[token].tolist(), found.gates[token].tolist(), strict=True))
        assert got == pytest.approx(wanted, abs=1e-12)
        routed = router.group - router.shared
        chosen = {i // routed * router.group + router.shared + i % routed for i in found.chosen[token].tolist()}
        assert chosen == {head for head in wanted if head % router.group >= router.shared}


@pytest.mark.parametrize("normalized", [True, False])
def test_experts_by_hand(normalized: bool) -> None:
    router = AttentionExperts(count=6, per_token=2, normalized=normalized)
    logits, bias = normal((30, 6), (6,))
    logits[3], bias = 1.0, 0.2 * bias
    found = router.choose(logits, bias)
    for token in range(30):
        p = softmax(logits[token].tolist())
        chosen = sorted(range(6), key=lambda e: (-(p[e] + float(bias[e].float())), e))[:2]
        total = sum(p[e] for e in chosen) if normalized else 1.0
        got = dict(zip(found.indices[token].tolist(), found.gates[token].tolist(), strict=True))
        assert got == pytest.approx({e: p[e] / total for e in chosen}, abs=1e-12)


def test_no_gradient_flows_through_the_sum_of_the_chosen() -> None:
    router = AttentionExperts(count=3, per_token=2)
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    gates = router.choose(logits, torch.zeros(3)).gates
    (gradient,) = torch.autograd.grad(gates[0, 0], logits)
    p = logits.detach().softmax(-1)[0]
    expected = p[0] * (torch.tensor([1.0, 0.0, 0.0]) - p) / (p[0] + p[1])
    assert torch.allclose(gradient[0], expected)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AttentionExperts, {"count": 2, "per_token": 3}, "per_token=3 must be from 1 to count=2"),
        (MixtureOfHeads, {"kv_heads": 2, "group": 4, "shared": 4, "per_token": 1}, "shared=4 must be less than the 4"),
        (MixtureOfHeads, {"kv_heads": 2, "group": 4, "shared": 1, "per_token": 4}, "per_token=4 must be from 1 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(kind: type, fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


@pytest.mark.parametrize(
    "router",
    [
        *(router for name, router in HEADS.items() if name != "all"),
        *(AttentionExperts(count=6, per_token=2, normalized=normalized) for normalized in (True, False)),
    ],
    ids=str,
)
def test_gates_are_finite_where_a_bias_chooses_heads_whose_softmax_underflows(
    router: MixtureOfHeads | AttentionExperts,
) -> None:
    (logits,) = normal((40, router.logits), dtype=torch.float32)
    logits[:, 0] += 1000
    bias = torch.zeros(router.choices)
    bias[0] = -2
    found = router.choose(logits.requires_grad_(), bias)
    assert not found.shares.gather(1, found.chosen).any()
    (gradient,) = torch.autograd.grad(found.gates.square().sum(), logits)
    assert found.gates.isfinite().all()
    assert gradient.isfinite().all()
