"""Choices over a full sequence: independent of the layout, checked by hand, with the bytes of the formula."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.parallel.comm import Channel, Unconnected
from farspan.parallel.expert_parallel.capacity import ExpertCapacity
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.simulation import simulate

TOKENS, EXPERTS = 37, 5


def on_ranks(layout: str, degree: int, parts: list[Tensor], choose) -> tuple[Tensor, list[int]]:
    """Return the results of the ranks in the order of the sequence, and the bytes that each sent."""
    shards = Shards.build(Rows.packed([TOKENS]), layout=layout, degree=degree, work=lambda rows: rows.position + 1.0)

    def run(channel: Channel) -> tuple[Tensor, int]:
        sequence = ExpertCapacity(channel, shards.index[channel.rank])
        found = choose(sequence, *(shards.shard(x, channel.rank, fill=1) for x in parts))
        return found, channel.traffic.sent.total()

    found, sent = zip(*simulate(degree, run), strict=True)
    padded = [part for part, index in zip(found, shards.index, strict=True) if part[index < 0].any()]
    assert not padded
    return shards.unshard(torch.stack(found)), list(sent)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("drop", ["weight", "position"])
def test_capacity_by_hand(drop, degree: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(dim=1)[:, :2]
    weights = torch.rand(TOKENS, 2, generator=generator).mul(4).round()  # many are equal: earlier tokens win
    selected, sent = on_ranks(
        layout, degree, [chosen, weights], lambda s, c, w: s.within_capacity(c, w, EXPERTS, factor=0.8, drop=drop)
    )
    capacity = 12  # 0.8 x 37 x 2 / 5 = 11.84
    expected = torch.zeros(TOKENS, 2, dtype=torch.bool)
    for expert in range(EXPERTS):
        line = [(t, k) for t in range(TOKENS) for k in range(2) if chosen[t, k] == expert]
        if drop == "weight":
            line.sort(key=lambda choice: -weights[choice].item())
        for choice in line[:capacity]:
            expected[choice] = True
    assert torch.equal(selected, expected)
    assert not selected.all()
    rows = -(-TOKENS // degree) if layout != "zigzag" else 2 * -(-TOKENS // (2 * degree))
    if layout != "balanced":
        assert sent == [(degree - 1) * rows * (8 + 16 + (8 if drop == "weight" else 0))] * degree


@pytest.mark.parametrize(
    ("factor", "tokens", "per_token", "experts", "capacity"),
    [(1.1, 100, 1, 10, 11), (1.1, 100, 4, 8, 55), (1.15, 100, 2, 4, 58), (1.25, 33, 1, 8, 6), (1e-3, 9, 1, 8, 1),
     (2.3, 1_000_000, 1, 10, 230_000), (9.0, 5, 1, 2, 5), (1.3, 0, 1, 4, 0)],
)  # fmt: skip
def test_a_capacity_is_rounded_up_from_the_decimal_number(
    factor: float, tokens: int, per_token: int, experts: int, capacity: int
) -> None:
    """All tokens choose the same experts; in float64, 1.1 x 100 is more than 110."""
    chosen = torch.arange(per_token).expand(tokens, -1)

    def run(channel: Channel) -> Tensor:
        sequence = ExpertCapacity(channel, torch.arange(tokens))
        return sequence.within_capacity(chosen, torch.ones(chosen.shape), experts, factor, "position")

    (taken,) = simulate(1, run)
    assert taken.sum(0).tolist() == [capacity] * per_token
    assert taken[:capacity].all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_experts_take_their_best_tokens(degree: int, layout: str) -> None:
    scores = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).mul(6).round()
    taken, _ = on_ranks(layout, degree, [scores], lambda s, x: s.chosen_by_experts(x, 2))
    for expert in range(EXPERTS):
        best = sorted(range(TOKENS), key=lambda token: (-scores[token, expert].item(), token))[:15]  # 37 x 2 / 5 = 14.8
        assert taken[:, expert].nonzero().flatten().tolist() == sorted(best)


def test_capacities_of_both_kinds_are_rounded_up() -> None:
    """Products that are integers, or next to one: 1.1 x 50 x 2 / 10 is 11.000000000000002 in float64."""
    for tokens, hundredths, experts in itertools.product((1, 3, 50, 100, 299), range(5, 200, 5), (4, 7, 10)):
        padded, weights = torch.cat((torch.arange(tokens), torch.tensor([-1, -1]))), torch.ones(tokens + 2, 2)
        sequence, chosen = ExpertCapacity(Unconnected(0, 1), padded), torch.tensor([[0, 1]]).expand(tokens + 2, -1)
        found = sequence.within_capacity(chosen, weights, experts, hundredths / 100, "weight").sum(dim=0)
        capacity = -(-hundredths * tokens * 2 // (100 * experts))
        assert found.tolist() == [min(capacity, tokens)] * 2, (tokens, hundredths, experts)
        taken = sequence.chosen_by_experts(torch.ones(tokens + 2, experts), 2).sum(dim=0)
        assert taken.tolist() == [min(math.ceil(tokens * 2 / experts), tokens)] * experts
