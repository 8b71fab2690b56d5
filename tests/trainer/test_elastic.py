"""A run that moves from any number of ranks and any mesh to any other goes on as one that stays where it is, and a run
that is resumed on the same ranks as one that was not stopped, to the bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.resilience.skip_steps import SkipConfig
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.runs import records, train_all

TOLERANCE = 1e-9
# What is on record: equal on any ranks, and within the tolerance.
EQUAL = ("stream", "tokens", "sequences", "expert_load", "expert_bias", "eval_tokens")
CLOSE = ("loss", "grad_norm", "eval_loss", "expert_balance_loss")
# Every one a step of its own: ranks and mesh.
DENSE = [
    (4, ParallelConfig(dp_shard=4)),
    (2, ParallelConfig(dp_shard=2)),
    (8, ParallelConfig(dp_replicate=2, dp_shard=2, context=2)),
    (1, ParallelConfig()),
    (4, ParallelConfig(context=4, strategy="ring", layout="striped")),
    (4, ParallelConfig(dp_shard=4)),
]
EXPERTS = [
    (2, ParallelConfig(dp_shard=2, expert=2)),
    (4, ParallelConfig(context=4, expert=4)),
    (1, ParallelConfig()),
    (8, ParallelConfig(dp_replicate=2, dp_shard=2, context=2, expert=2)),
    (2, ParallelConfig(context=2)),
]
MODELS = {"dense, tied": {"tied_embeddings": True}, "experts with biases": {"experts": tiny.EXPERTS}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "places"), [("dense, tied", DENSE), ("experts with biases", EXPERTS)])
def test_a_run_that_moves_is_the_run_that_stays(
    tiny_data: Path, tmp_path: Path, ranks: Pools, model: str, places: list[tuple[int, ParallelConfig]]
) -> None:
    def config(folder: str, steps: int, parallel: ParallelConfig) -> Config:
        base = tiny.config(tiny_data, tmp_path / folder, parallel, steps=len(places))
        return replace(
            tiny.with_model(base, layers=1, **MODELS[model]),
            # Every stop on the way has the learning rate of the full run.
            train=replace(base.train, sequences_per_step=8, steps=steps),
            optimizer=replace(base.optimizer, schedule="wsd", warmup_steps=0, decay_fraction=0.0),
            checkpoint=CheckpointConfig(every_steps=1, keep=1),
            evaluate=EvaluateConfig(every_steps=len(places), sequences=3),
            # Nothing is so far off; what it compares with has to travel along.
            skip=SkipConfig(spike_sigma=1e6, window=3),
        )

    left: dict[str, str] = {}
    for step, (size, parallel) in enumerate(places):
        arrivals = ranks(size).run(train_all, config("moving", step + 1, parallel))
        for loaded, _ in arrivals if step else []:
            assert loaded == left, f"the load at step {step}"
        left = arrivals[0][1]
        assert [found for _, found in arrivals] == [left] * size
    ranks(1).run(train_all, config("staying", len(places), ParallelConfig()))

    moved, stayed = records(tmp_path / "moving"), records(tmp_path / "staying")
    last = [record for record in moved if record["step"] == len(places) or "loss" in record]
    assert [record["step"] for record in last] == [record["step"] for record in stayed]
    for found, truth in zip(last, stayed, strict=True):
        for name in EQUAL:
            assert found.get(name) == truth.get(name), (name, found["step"])
        for name in CLOSE:
            assert found.get(name) == pytest.approx(truth.get(name), abs=TOLERANCE), (name, found["step"])
    assert len({record["stream"] for record in stayed if "stream" in record}) == len(places)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_has_the_same_bits(tiny_data: Path, tmp_path: Path, ranks: Pools) -> None:
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    config = tiny.config(tiny_data, undisturbed, ParallelConfig(context=2, expert=2), steps=6)
    config = replace(
        tiny.with_model(config, experts=replace(tiny.EXPERTS, layers="dense, experts")),
        train=replace(config.train, compute_dtype="float32"),
        checkpoint=CheckpointConfig(every_steps=3, keep=2),
        evaluate=EvaluateConfig(every_steps=0, sequences=3),
    )
    (_, expected), *_ = ranks(2).run(train_all, config)

    # The folder as a run leaves it that was killed after step 3: the last checkpoint is gone, its records are not.
    shutil.copytree(undisturbed, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000006")
    (loaded, found), *_ = ranks(2).run(train_all, replace(config, run=replace(config.run, folder=resumed)))
    assert loaded != expected, "the steps after the resume were not run again"
    assert found == expected

    before, after = records(undisturbed), records(resumed)
    for run in (before, after):
        assert [record["step"] for record in run] == [*range(1, 7), 6]
    for old, new in zip(before, after, strict=True):
        for name in (*EQUAL, *CLOSE, "loss_by_position", "expert_z_loss"):
            assert old.get(name) == new.get(name), (name, old["step"])
