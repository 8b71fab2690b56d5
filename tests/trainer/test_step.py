import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.kernels.masks.rows import Rows
from farspan.trainer.batch import MicroBatch
from farspan.trainer.data.packing import IGNORED
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
from farspan.trainer.model.transformer import Output, SequenceContext
from farspan.trainer.step import StepResult, train_step
from tests.support.rank_pool import Pools, world_channel

# Per rank, per micro-batch: tokens and labels. Uneven on purpose: 3, 1 and 1, 0 labeled tokens.
TOKENS = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]]
LABELS = [[[1, 1, 1], [1, IGNORED, IGNORED]], [[IGNORED, 1, IGNORED], [IGNORED] * 3]]


class Linear(nn.Module):
    """The loss of a labeled token is its value times the one parameter."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
        self.seeds: list[int] = []

    def layers_of(self, kind: type) -> list[nn.Module]:
        return []

    def forward(self, tokens: Tensor, labels: Tensor, context: object) -> Output:
        self.seeds.append(torch.initial_seed())
        return Output(torch.where(labels == IGNORED, 0.0, tokens * self.weight), (), ())


@dataclass
class Outcome:
    result: StepResult
    gradient: float | None
    weight: float
    steps_of_optimizer: int
    seeds: list[int]


def run(weight: float, labels: list, max_norm: float) -> Outcome:
    rank = dist.get_rank()
    model: Any = Linear(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    batches = [
        MicroBatch(
            tokens=torch.tensor(t, dtype=torch.float64),
            labels=torch.tensor(y),
            context=SequenceContext(rows=Rows.packed([len(t)]), attention=()),
            valid_tokens=len(y) - y.count(IGNORED),
            real_tokens=len(t),
            attention_flops=10 * rank + i,
            fingerprint=2**32 - 10 * rank - i,
            seed=10 * rank + i,
        )
        for i, (t, y) in enumerate(zip(TOKENS[rank], labels[rank], strict=True))
    ]
    result = train_step(Fsdp2Engine(model, optimizer, max_norm), batches, context=world_channel())
    gradient = None if model.weight.grad is None else model.weight.grad.item()
    return Outcome(result, gradient, model.weight.item(), len(optimizer.state), model.seeds)


def test_the_loss_is_the_mean_over_all_labelled_tokens(ranks: Pools) -> None:
    outcomes = ranks(2).run(run, 2.0, LABELS, 1e9)
    for outcome in outcomes:
        # 5 labeled tokens on both ranks: 1 + 2 + 3 + 4 and 8, times 2.
        assert outcome.result.loss == pytest.approx(2 * (1 + 2 + 3 + 4 + 8) / 5)
        assert outcome.result.labeled_tokens == 5
        assert outcome.result.attention_flops == 0 + 1 + 10 + 11
        assert outcome.result.fingerprint == 4 * 2**32 - (0 + 1 + 10 + 11)
        assert outcome.result.skipped is None
    assert [outcome.seeds for outcome in outcomes] == [[0, 1], [10, 11]]
    # FSDP sums over the 2 ranks, so each gradient is its part of the mean's.
    assert [outcome.gradient for outcome in outcomes] == pytest.approx([10 / 5, 8 / 5])
    assert outcomes[0].weight == pytest.approx(2.0 - 0.5 * 10 / 5)


def test_the_gradient_is_clipped_and_its_norm_reported(ranks: Pools) -> None:
    outcome = ranks(2).run(run, 2.0, LABELS, 0.5)[0]
    assert outcome.result.gradient_norm == pytest.approx(2.0)
    assert outcome.gradient == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_update_on_any_rank(ranks: Pools, weight: float) -> None:
    # No label on rank 1: by itself it would see nothing wrong.
    labels = [LABELS[0], [[IGNORED] * 3] * 2]
    outcomes = ranks(2).run(run, weight, labels, 1.0)
    assert [outcome.result.skipped for outcome in outcomes] == [f"the loss is {weight}"] * 2
    assert [outcome.steps_of_optimizer for outcome in outcomes] == [0, 0]


def test_a_batch_without_labels_is_no_update_on_any_rank(ranks: Pools) -> None:
    for outcome in ranks(2).run(run, 2.0, [[[IGNORED] * 3] * 2] * 2, 1.0):
        assert outcome.result.skipped == "no token of its sequences has a label"
        assert math.isnan(outcome.result.loss)
        assert (outcome.result.labeled_tokens, outcome.result.gradient_norm) == (0, 0.0)
        assert (outcome.weight, outcome.steps_of_optimizer) == (2.0, 0)
