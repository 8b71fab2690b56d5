"""Learning rates and AdamW's updates against values worked out by hand."""

import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import optim
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.optim import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.runs import records, run_alone
from tests.support.steps import Trajectory, assert_same, two_steps


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_cosine_falls_from_the_peak_to_the_final_fraction() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1, schedule="cosine")
    found = rates(config, 12)
    assert found[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    # 0.2 + 1.8 (1 + cos(pi x)) / 2 at x = 2/8, 4/8, 7/8.
    assert [found[6], found[8], found[11]] == pytest.approx([1.736396, 1.1, 0.268508], abs=1e-6)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_wsd_is_stable_then_falls_linearly() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, final_fraction=0.2, decay_fraction=0.4, schedule="wsd")
    # The last 4 of 10 updates fall from 1 toward 0.2 in steps of 0.2.
    assert rates(config, 10) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4])
    # 0.29 of 100 is 28.999... in binary.
    found = rates(replace(config, decay_fraction=0.29), 100)
    assert found[70:74] == pytest.approx([1.0, 1.0, 0.2 + 0.8 * 28 / 29, 0.2 + 0.8 * 27 / 29])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_degenerate_schedules(schedule) -> None:
    constant = OptimizerConfig(
        learning_rate=1.0, warmup_steps=0, final_fraction=1.0, decay_fraction=0.0, schedule=schedule
    )
    assert rates(constant, 5) == [1.0] * 5
    rising = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule=schedule, decay_fraction=0.0)
    assert rates(rising, 3) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.fixture(params=[False, True], ids=["each in turn", "fused"])
def is_fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether updates are fused, as on a GPU; torch fuses them on a CPU also."""
    monkeypatch.setattr(optim, "is_on_gpu", lambda _: request.param)
    return request.param


def test_updates_are_adamw_with_decay_of_matrices_only(is_fused: bool) -> None:
    config = OptimizerConfig(learning_rate=0.5, beta1=0.9, beta2=0.95, epsilon=1.0, weight_decay=0.1)
    one = torch.tensor([1.0], dtype=torch.float64)
    model = nn.ParameterDict({"matrix": one[None], "norm": one.clone()})
    optimizer = build_optimizer(model, config)
    assert {group["fused"] for group in optimizer.param_groups} == {is_fused or None}
    set_learning_rate(optimizer, 0.2)
    for gradient in (2.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    # Both moments corrected for their start at zero: first step 2 / (sqrt(4) + 1), then m = 0.28, v = 0.24.
    first = 0.2 * 2 / (2 + 1)
    second = 0.2 * (0.28 / (1 - 0.9**2)) / (math.sqrt(0.24 / (1 - 0.95**2)) + 1)
    decay = 1 - 0.2 * 0.1
    assert model["matrix"].item() == pytest.approx((decay - first) * decay - second, rel=1e-12)
    assert model["norm"].item() == pytest.approx(1 - first - second, rel=1e-12)


def two_fused_steps(configs: list[Config]) -> list[Trajectory]:
    with mock.patch.object(optim, "is_on_gpu", return_value=True):
        return two_steps(configs)


def test_fused_updates_of_experts_on_a_mesh_of_their_own(base: Config, ranks: Pools) -> None:
    """One kernel takes all parameters, sharded over two meshes: torch before 2.9 refuses that."""
    parallel = ParallelConfig(context=2, dp_shard=2, expert=2, strategy="ring")
    config = replace(tiny.with_model(base, layers=1, experts=tiny.EXPERTS), parallel=parallel)
    for fused, plain in zip(*(ranks(4).run(of, [config]) for of in (two_fused_steps, two_steps)), strict=True):
        assert_same(fused[0], plain[0])


def test_fused_and_other_updates_resume_each_other(
    is_fused: bool, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a GPU on a CPU, and the reverse; the count of updates corrects both moments."""
    losses = []
    for folder, stops in (("moved", (2, 4)), ("stayed", (4,))):
        for stop in stops:
            monkeypatch.setattr(optim, "is_on_gpu", lambda _, stop=stop: is_fused == (stop == 2))
            config = tiny.config(tiny_data, tmp_path / folder, ParallelConfig(), steps=4)
            config = tiny.with_model(replace(config, train=replace(config.train, steps=stop)), layers=1)
            schedule = replace(config.optimizer, schedule="wsd", warmup_steps=0, decay_fraction=0.0)
            idle = CheckpointConfig(every_steps=2), EvaluateConfig(every_steps=0)
            run_alone(replace(config, optimizer=schedule, checkpoint=idle[0], evaluate=idle[1]))
        losses.append([record["loss"] for record in records(tmp_path / folder) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert len(losses[0]) == 4
