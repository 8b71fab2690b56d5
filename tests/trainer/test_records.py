"""Every figure that a run puts on record, against a computation of its own."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import IGNORED, ShuffledSequences
from farspan.trainer.optim import OptimizerConfig
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import open_all_data, open_data
from farspan.trainer.train import train
from tests.support import runs, tiny
from tests.support import steps as reference
from tests.support.decoder import summed_loss
from tests.support.mixture import Seen
from tests.support.rank_pool import Pools

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 10
PEAK_FLOPS = 1e10
"""What `runs.run` has instead of a measurement, for each rank."""


def cosine(step: int, steps: int, peak: float) -> float:
    """The rate of step 1, 2, ...: three of warm-up, then from the peak to a tenth of it."""
    if step <= 3:
        return peak * step / 3
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - 4) / (steps - 3)))


def wsd(step: int, steps: int, peak: float) -> float:
    """Three steps of warm-up, a plateau, and over the last 40 % of the steps down to a tenth."""
    if step <= 3:
        return peak * step / 3
    falling = round(0.4 * steps)
    return peak * (0.1 + 0.9 * min((steps - step + 1) / falling, 1))


@pytest.mark.parametrize("schedule", [cosine, wsd])
def test_rates_are_those_of_the_schedule(
    tiny_data: Path, tmp_path: Path, schedule: Callable[[int, int, float], float]
) -> None:
    config = tiny.with_model(tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=6), layers=1)
    config = replace(
        config,
        data=replace(config.data, sequence_tokens=16),
        optimizer=OptimizerConfig(
            learning_rate=0.02,
            warmup_steps=3,
            schedule=schedule.__name__,  # pyright: ignore[reportArgumentType]
            decay_fraction=0.4,
        ),
        evaluate=EvaluateConfig(every_steps=0, sequences=1),
        checkpoint=CheckpointConfig(every_steps=5),
    )
    expected = {}
    # A run, the same resumed after the first run was cut off behind step 5, and with more steps and another peak.
    for steps, peak, last in ((6, 0.02, 0), (6, 0.02, 5), (12, 0.01, 6)):
        if last == 5:
            (tmp_path / "run" / "checkpoints" / "step_00000006").rename(tmp_path / "gone")
        rates = replace(config.optimizer, learning_rate=peak)
        train(replace(config, train=replace(config.train, steps=steps), optimizer=rates), Ranks(), StopSignal())
        expected |= {step: schedule(step, steps, peak) for step in range(last + 1, steps + 1)}
        found = {r["step"]: r["learning_rate"] for r in runs.records(tmp_path / "run") if "loss" in r}
        assert found == pytest.approx(expected, rel=1e-12)


def train_all(config: Config) -> dict[str, Tensor]:
    """On a rank: train; return the full parameters."""
    model = runs.run(config).model
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}  # pyright: ignore


def flops_of(config: Config, sequences: list[Any]) -> float:
    """Of a training step, forward and backward: two for each multiply-add, the backward pass twice the forward pass."""
    model = config.model
    attention = model.width * model.head_dim * 2 * (model.heads + model.kv_heads)
    matrices = model.layers * (attention + 3 * model.width * model.feed_forward) + model.width * model.vocabulary_size
    pairs = sum(int(p) + 1 for sequence in sequences for p in sequence.position)
    per_pair = 2 * 2 * model.head_dim * model.heads * model.layers
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    return 3.0 * (2 * matrices * tokens + per_pair * pairs)


def test_figures_of_steps_and_evaluations(
    tiny_data: Path, tmp_path: Path, ranks: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(context=2), steps=STEPS)
    config = replace(config, evaluate=EvaluateConfig(every_steps=0, sequences=2))
    start = ranks(1).run(reference.initial_parameters, replace(config, parallel=ParallelConfig()))[0]
    parameters = ranks(2).run(train_all, config)[0]
    *records, evaluation = runs.records(config.run.folder)

    data = ShuffledSequences(open_data(config)[0], sequence_tokens=tiny.SEQUENCE_TOKENS, seed=config.run.seed)
    monkeypatch.setattr(reference, "sequences", lambda config: data)
    truth = reference.train_reference(config, start)
    assert [record["loss"] for record in records] == pytest.approx(truth.losses, abs=1e-9)
    assert [record["grad_norm"] for record in records] == pytest.approx(truth.norms, abs=1e-9)
    labeled = 0
    for step, record in enumerate(records):
        batch = [data.sequence(index) for index in (2 * step, 2 * step + 1)]
        labeled += sum(int((sequence.labels != IGNORED).sum()) for sequence in batch)
        assert (record["step"], record["tokens"], record["skipped"]) == (step + 1, labeled, 0)
        assert record["tokens_per_s"] * record["step_s"] == pytest.approx(2 * tiny.SEQUENCE_TOKENS)
        flops = record["mfu"] * record["step_s"] * 2 * PEAK_FLOPS
        assert flops == pytest.approx(flops_of(config, batch), rel=1e-12)
        assert record["comm_bytes"] == sum(record["comm_bytes_by_kind"].values()) > 0

    drawn = open_all_data(config)[1]["eval"]
    sequences = [drawn.data.sequence(index) for index in drawn.indexes]
    with torch.no_grad():
        loss = sum(float(summed_loss(parameters, config, sequence, Seen())) for sequence in sequences)
    labels = [int(label) for sequence in sequences for label in sequence.labels if label != IGNORED]
    num_bytes = len(bytes(label for label in labels if label < 256))
    assert (evaluation["step"], evaluation["eval_tokens"]) == (STEPS, len(labels))
    assert evaluation["eval_loss"] == pytest.approx(loss / len(labels), abs=1e-9)
    assert evaluation["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, abs=1e-9)
