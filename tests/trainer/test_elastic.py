"""A run that moves from any number of ranks and any mesh to any other goes on as one that stays where it is."""

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
    tmp_path: Path, ranks: Pools, model: str, places: list[tuple[int, ParallelConfig]]
) -> None:
    def config(folder: str, steps: int, parallel: ParallelConfig) -> Config:
        base = tiny.config(tmp_path / "tokens", tmp_path / folder, parallel, steps=len(places))
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

    tiny.make_data(tmp_path)
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
        for name in ("stream", "tokens", "sequences", "expert_load", "expert_bias", "eval_tokens"):
            assert found.get(name) == truth.get(name), (name, found["step"])
        for name in ("loss", "grad_norm", "eval_loss", "expert_balance_loss"):
            assert found.get(name) == pytest.approx(truth.get(name), abs=TOLERANCE), (name, found["step"])
    assert len({record["stream"] for record in stayed if "stream" in record}) == len(places)
