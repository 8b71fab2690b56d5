"""Steps that are no updates: what one rank spoils changes nothing on any, and its batch can be computed again."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from farspan.errors import ConfigError, TrainingError
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import replay, train
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import PackedSequences, ShuffledSequences
from farspan.trainer.engines.engine import Engine
from farspan.trainer.replay import read_batch, write_batch
from farspan.trainer.resilience.skip_steps import SkipConfig, not_finite, reason_to_skip, remember
from farspan.trainer.resolve import open_data
from farspan.trainer.state import TrainState
from farspan.trainer.step import StepResult
from tests.support import tiny
from tests.support.rank_pool import Pools, error_of
from tests.support.runs import Parts, records, run

EXPERTS = replace(tiny.EXPERTS, groups=2)
POISON = ord("o")
"""A byte of every document."""


def test_what_is_not_finite_is_named() -> None:
    assert not_finite(1.0, 2.0) is None
    assert not_finite(math.nan, math.nan) == "the loss is nan"
    assert not_finite(math.inf, 1.0) == "the loss is inf"
    assert not_finite(1.0, -math.inf) == "the gradient norm is -inf"


def history(config: SkipConfig, losses: list[float], norms: list[float]) -> TrainState:
    state = TrainState()
    for loss, norm in zip(losses, norms, strict=True):
        remember(config, state, loss, norm, None)
    return state


def test_a_spike_is_what_is_far_above_the_last_updates() -> None:
    config = SkipConfig(spike_sigma=2.0, window=4)
    # The first one has left the window: mean 2.5, standard deviation sqrt(1.25); norms have none.
    state = history(config, [100.0, 1.0, 2.0, 3.0, 4.0], [1.0] * 5)
    assert (state.recent_losses, state.recent_norms) == ([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    limit = 2.5 + 2 * math.sqrt(1.25)
    assert reason_to_skip(config, state, limit - 1e-9, 1.0) is None
    assert reason_to_skip(config, state, -100.0, 0.5) is None
    above = reason_to_skip(config, state, limit + 1e-9, 1.0)
    assert above == "the loss is 4.73607, more than 2 deviations of 1.12 above 2.5"
    assert reason_to_skip(config, state, 2.5, 1.5) == "the gradient norm is 1.5, more than 2 deviations of 0 above 1"
    assert reason_to_skip(config, state, math.nan, 1.0) == "the loss is nan"


def test_no_spike_is_seen_before_there_are_enough_updates() -> None:
    config = SkipConfig(spike_sigma=1.0, window=4)
    state = history(config, [1.0, 1.0, 1.0], [1.0] * 3)
    assert reason_to_skip(config, state, 9.0, 9.0) is None
    assert reason_to_skip(SkipConfig(), history(config, [1.0] * 4, [1.0] * 4), 9.0, 9.0) is None


def test_skipped_steps_are_counted_and_not_compared_with() -> None:
    config = SkipConfig(spike_sigma=1.0, window=4)
    state = history(config, [1.0], [2.0])
    for _ in range(2):
        remember(config, state, math.nan, 3.0, "the loss is nan")
    assert (state.skipped, state.skipped_in_a_row, state.recent_losses, state.recent_norms) == (2, 2, [1.0], [2.0])
    remember(config, state, 5.0, 6.0, None)
    assert (state.skipped, state.skipped_in_a_row) == (2, 0)
    assert (state.recent_losses, state.recent_norms) == ([1.0, 5.0], [2.0, 6.0])
    # A run that goes on without the rule has nothing to carry along.
    remember(SkipConfig(), state, 5.0, 6.0, None)
    assert (state.recent_losses, state.recent_norms) == ([], [])


def spoil(module: object, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
    output[0].register_hook(lambda gradient: gradient * math.nan)


def three_steps(config: Config, spoil_on: int | None) -> tuple[dict[str, str], dict[str, int]]:
    """On a rank: the second step has a NaN in a gradient of one rank or, if that is None, is not done at all."""
    step, calls = train.train_step, count(1)

    def second_differs(engine: Engine, *arguments: Any, **named: Any) -> StepResult:
        is_second = next(calls) == 2
        if is_second and spoil_on is None:
            counts = {"labeled_tokens": 0, "attention_flops": 0, "fingerprint": 0, "experts": None, "heads": None}
            return StepResult(loss=math.nan, gradient_norm=math.nan, skipped="left out", **counts)
        spoils = is_second and spoil_on == dist.get_rank()
        with engine.model.blocks[0].register_forward_hook(spoil) if spoils else nullcontext():
            return step(engine, *arguments, **named)

    with mock.patch.object(train, "train_step", second_differs):
        parts = run(config)
    state = parts.state
    return parts.bits(), {"step": state.step, "sequences": state.sequences, "skipped": state.skipped}


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_one_rank_spoils_is_as_if_it_were_left_out(tiny_data: Path, tmp_path: Path, ranks: Pools) -> None:
    parallel = ParallelConfig(context=2, dp_shard=2, expert=4)
    spoilt, left_out = (
        tiny.with_model(tiny.config(tiny_data, tmp_path / name, parallel, steps=3), experts=EXPERTS)
        for name in ("spoilt", "left_out")
    )
    pairs = zip(ranks(4).run(three_steps, spoilt, 2), ranks(4).run(three_steps, left_out, None), strict=True)
    for (bits, counts), (other_bits, other_counts) in pairs:
        assert any("bias" in name for name in bits)
        assert [name for name, value in bits.items() if value != other_bits[name]] == []
        assert counts == other_counts == {"step": 3, "sequences": 6, "skipped": 1}
    reasons = [record.get("skipped_since") for record in records(tmp_path / "spoilt") if "loss" in record]
    assert reasons == [None, "the gradient norm is nan", None]


def given_up(config: Config, is_poisoned: bool) -> str:
    """On a rank: the error that ends the run."""

    def poison(parts: Parts) -> None:
        if is_poisoned and dist.get_rank() == 0:
            with torch.no_grad():
                parts.model.embedding.weight.to_local()[POISON] = math.inf  # pyright: ignore[reportAttributeAccessIssue]

    with pytest.raises(TrainingError) as stopped:
        run(config, after_load=poison)
    return str(stopped.value)


def replayed(config: Config, folder: Path) -> list[str]:
    """On a rank: the log lines about a batch."""
    loaded: dict[str, str] = {}
    with mock.patch.object(replay.log, "info") as info:
        parts = run(
            replace(config, run=replace(config.run, replay=folder)),
            after_load=lambda parts: loaded.update(parts.bits()),
        )
    assert parts.bits() == loaded
    lines = [call.args[0] % call.args[1:] for call in info.mock_calls]
    return lines[next(number for number, line in enumerate(lines) if line.startswith("resumed")) :]


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    parallel = ParallelConfig(context=2, expert=2)
    return replace(
        tiny.with_model(tiny.config(tiny_data, tmp_path / "run", parallel, steps=9), experts=EXPERTS),
        checkpoint=CheckpointConfig(every_steps=9),
        evaluate=EvaluateConfig(every_steps=0),
    )


@pytest.mark.filterwarnings("ignore")
def test_too_many_in_a_row_end_the_run_and_leave_the_batch(config: Config, ranks: Pools) -> None:
    folder = config.run.folder / "failed_batch" / "step_00000003"
    poisoned = replace(config, skip=SkipConfig(max_consecutive_skips=2))
    message, other = ranks(2).run(given_up, poisoned, True)
    assert message == other
    for part in ("3 steps in a row", "the loss is nan", f"run.replay={folder},", "optimizer.learning_rate"):
        assert part in message
    on_record = records(config.run.folder)
    assert [(each["step"], each["loss"], each["skipped"]) for each in on_record] == [(n, None, n) for n in (1, 2, 3)]
    assert {record["skipped_since"] for record in on_record} == {"the loss is nan"}
    assert [path.name for path in (config.run.folder / "checkpoints").iterdir()] == ["step_00000003"]

    lines = ranks(2).run(replayed, config, folder)[0]
    assert lines[:4] == [
        f"resumed     at step 3 from {config.run.folder}/checkpoints/step_00000003",
        f"replayed    {folder}: loss nan, gradient norm nan",
        "            not finite: losses of sequences 4, 5",
        "            not finite: parameters embedding.weight",
    ]
    assert re.fullmatch(r" +not finite: gradients \S+, \S+, \S+, \S+ and \d+ more", lines[4])
    assert len(lines) == 5
    # Each of two data-parallel groups has a sequence, and only that of the second has the poison.
    batch, half = read_batch(folder), config.run.folder / "failed_batch" / "half"
    batch[4] = replace(batch[4], tokens=np.where(batch[4].tokens == POISON, 0, batch[4].tokens))
    write_batch(half, batch)
    for lines in ranks(2).run(replayed, replace(config, parallel=ParallelConfig(dp_shard=2)), half):
        assert lines[1:4] == [
            f"replayed    {half}: loss nan, gradient norm nan",
            "            not finite: losses of sequences 5",
            "            not finite: parameters embedding.weight",
        ]
    # From the checkpoint, which has the poison, it goes on with the next batch, to be stopped at once.
    assert ranks(2).run(given_up, poisoned, False)[0].startswith("4 steps in a row ")


@pytest.mark.filterwarnings("ignore")
def test_a_replayed_batch_has_the_loss_that_it_had(config: Config, ranks: Pools) -> None:
    # The first step that is above the mean of the two before.
    impatient = replace(config, skip=SkipConfig(max_consecutive_skips=0, spike_sigma=1e-9, window=2))
    message = ranks(2).run(given_up, impatient, False)[0]
    last = records(config.run.folder)[-1]
    assert message.startswith("1 steps in a row ")
    folder = config.run.folder / "failed_batch" / f"step_{last['step']:08d}"
    data = ShuffledSequences(open_data(config)[0], sequence_tokens=tiny.SEQUENCE_TOKENS, seed=config.run.seed)
    batch = read_batch(folder)
    assert list(batch) == [2 * last["step"] - 2, 2 * last["step"] - 1]
    for index, sequence in batch.items():
        for name in ("tokens", "labels", "position", "document"):
            assert np.array_equal(getattr(sequence, name), getattr(data.sequence(index), name)), name
    assert ranks(2).run(replayed, config, folder)[0][1:] == [
        f"replayed    {folder}: loss {last['loss']!r}, gradient norm {last['grad_norm']!r}",
        "            not finite: losses of sequences none",
        "            not finite: parameters none",
        "            not finite: gradients none",
    ]


def test_a_folder_without_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.replay=.* holds no batch\.npz that can be read \(.*No such file"):
        read_batch(tmp_path)
    (tmp_path / "batch.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ConfigError, match=r"run\.replay=.* holds no batch\.npz that can be read"):
        read_batch(tmp_path)


def test_a_batch_that_the_ranks_cannot_share_is_refused(config: Config, tmp_path: Path, ranks: Pools) -> None:
    sequence = PackedSequences(open_data(config)[0], sequence_tokens=101, seed=0).sequence(0)
    write_batch(tmp_path / "batch", {7: sequence})
    parted = replace(config, parallel=ParallelConfig(dp_shard=2), run=replace(config.run, replay=tmp_path / "batch"))
    answers = ranks(2).run(error_of, ConfigError, run, parted)
    assert answers[0] == answers[1]
    assert "has 1 sequences, which 2 data-parallel groups cannot share" in answers[0]
