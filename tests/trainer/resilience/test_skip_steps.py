"""Steps that are no updates: what one rank spoils changes nothing on any, and its batch can be computed again."""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from farspan.errors import ConfigError, TrainingError
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.data.shuffle import ShuffledSequences
from farspan.trainer.metrics import StepTimer
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.replay import read_batch, write_batch
from farspan.trainer.resilience.skip_steps import SkipConfig, not_finite, reason_to_skip, remember
from farspan.trainer.resolve import open_data
from farspan.trainer.state import TrainState
from farspan.trainer.train import _Run
from tests.support import tiny
from tests.support.rank_pool import RankPool
from tests.support.runs import bits, built, records

EXPERTS = ExpertsConfig(
    count=4, feed_forward=16, score="sigmoid", bias_rate=0.05, balance_loss=0.01, z_loss=0.01, groups=2
)
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
    config = SkipConfig(sigma=2.0, window=4)
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
    config = SkipConfig(sigma=1.0, window=4)
    state = history(config, [1.0, 1.0, 1.0], [1.0] * 3)
    assert reason_to_skip(config, state, 9.0, 9.0) is None
    assert reason_to_skip(SkipConfig(), history(config, [1.0] * 4, [1.0] * 4), 9.0, 9.0) is None


def test_skipped_steps_are_counted_and_not_compared_with() -> None:
    config = SkipConfig(sigma=1.0, window=4)
    state = history(config, [1.0], [2.0])
    for _ in range(2):
        remember(config, state, math.nan, 3.0, "the loss is nan")
    assert (state.skipped, state.skipped_in_a_row, state.recent_losses, state.recent_norms) == (2, 2, [1.0], [2.0])
    remember(config, state, 5.0, 6.0, None)
    assert (state.skipped, state.skipped_in_a_row, state.recent_losses, state.recent_norms) == (
        2,
        0,
        [1.0, 5.0],
        [2, 6],
    )
    # A run that goes on without the rule has nothing to carry along.
    remember(SkipConfig(), state, 5.0, 6.0, None)
    assert (state.recent_losses, state.recent_norms) == ([], [])


def steps(run: _Run, spoil_on: int | None) -> tuple[list[str | None], dict[str, str], dict[str, int]]:
    """On a rank: three steps; the second has a NaN in a gradient on one rank, or is left out."""
    timer, reasons = StepTimer(3), []
    for step in range(3):
        handles = []
        if step == 1 and spoil_on is None:
            run.state.step += 1
            run.state.sequences += run.config.train.sequences_per_step
            continue
        if step == 1 and spoil_on == dist.get_rank():
            handles.append(run.model.blocks[0].register_forward_hook(spoil))
        reasons.append(run.step(timer)[1])
        for handle in handles:
            handle.remove()
    state = run.state
    counted = {"step": state.step, "sequences": state.sequences, "skipped": state.skipped}
    return reasons, bits(run), counted


def spoil(module: object, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
    output[0].register_hook(lambda gradient: gradient * math.nan)


def spoilt_and_left_out(config: Config, spoil_on: int) -> list[tuple[list[str | None], dict[str, str], dict[str, int]]]:
    answers = []
    for rank in (spoil_on, None):
        with built(config) as run:
            answers.append(steps(run, rank))
    return answers


@pytest.mark.parametrize("parallel", [ParallelConfig(context=2, dp_shard=2, expert=4)], ids=["context 2, data 2"])
def test_a_step_that_one_rank_spoils_is_as_if_it_were_left_out(
    tmp_path: Path, ranks: Callable[[int], RankPool], parallel: ParallelConfig
) -> None:
    config = tiny.with_model(
        tiny.config(tiny.make_data(tmp_path), tmp_path / "run", parallel, steps=3), experts=EXPERTS
    )
    for spoilt, left_out in ranks(4).run(spoilt_and_left_out, config, 2):
        assert spoilt[0] == [None, "the gradient norm is nan", None]
        assert left_out[0] == [None, None]
        assert any("bias" in name for name in spoilt[1])
        assert [name for name, value in spoilt[1].items() if value != left_out[1][name]] == []
        assert spoilt[2] == {"step": 3, "sequences": 6, "skipped": 1}


def given_up(config: Config, is_poisoned: bool) -> str:
    """On a rank: what the run ends with."""
    with built(config) as run:
        run.load()
        if is_poisoned and dist.get_rank() == 0:
            with torch.no_grad():
                run.model.embedding.weight.to_local()[POISON] = math.inf  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(TrainingError) as stopped:
            run.loop()
        return str(stopped.value)


def replayed(config: Config, folder: Path) -> list[str]:
    """On a rank: what is said of a batch."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("farspan")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with built(config) as run:
            run.load()
            before = bits(run)
            run.replay(folder)
            assert bits(run) == before
    finally:
        log.removeHandler(handler)
    return said


@pytest.fixture
def config(tmp_path: Path) -> Config:
    parallel = ParallelConfig(context=2, expert=2)
    base = tiny.config(tiny.make_data(tmp_path), tmp_path / "run", parallel, steps=9)
    return replace(
        tiny.with_model(base, experts=EXPERTS),
        checkpoint=CheckpointConfig(every_steps=9),
        evaluate=EvaluateConfig(every_steps=0),
    )


@pytest.mark.filterwarnings("ignore")
def test_too_many_in_a_row_end_the_run_and_leave_the_batch(config: Config, ranks: Callable[[int], RankPool]) -> None:
    folder = config.run.folder / "failed_batch" / "step_00000003"
    expected = (
        "3 steps in a row had to be skipped, the last, 3, since the loss is nan: compute its batch again with "
        f"run.replay={folder}, lower optimizer.learning_rate, or look at the data; the same command goes on with the "
        "next batch."
    )
    poisoned = replace(config, skip=SkipConfig(most=2))
    assert ranks(2).run(given_up, poisoned, True) == [expected] * 2
    on_record = records(config.run.folder)
    assert [(record["step"], record["loss"], record["skipped"]) for record in on_record] == [
        (1, None, 1), (2, None, 2), (3, None, 3),
    ]  # fmt: skip
    assert {record["skipped_since"] for record in on_record} == {"the loss is nan"}
    assert [path.name for path in (config.run.folder / "checkpoints").iterdir()] == ["step_00000003"]

    said = ranks(2).run(replayed, config, folder)
    assert said[0] == [
        f"resumed     at step 3 from {config.run.folder}/checkpoints/step_00000003",
        f"replayed    {folder}: loss nan, gradient norm nan",
        "            not finite: losses of sequences 4, 5",
        "            not finite: parameters embedding.weight",
        *said[0][4:],
    ]
    assert re.fullmatch(r" +not finite: gradients \S+, \S+, \S+, \S+ and \d+ more", said[0][4])
    assert len(said[0]) == 5
    # From the checkpoint, which has the poison, it goes on with the next batch, to be stopped at once.
    assert ranks(2).run(given_up, poisoned, False)[0].startswith("4 steps in a row had to be skipped, the last, 4, ")


@pytest.mark.filterwarnings("ignore")
def test_a_replayed_batch_has_the_loss_that_it_had(config: Config, ranks: Callable[[int], RankPool]) -> None:
    # The first step that is above the mean of the two before.
    message = ranks(2).run(given_up, replace(config, skip=SkipConfig(most=0, sigma=1e-9, window=2)), False)[0]
    last = records(config.run.folder)[-1]
    assert message.startswith(f"1 steps in a row had to be skipped, the last, {last['step']}, since the ")
    folder = config.run.folder / "failed_batch" / f"step_{last['step']:08d}"
    data = ShuffledSequences(
        PackedSequences(open_data(config)[0], sequence_tokens=tiny.SEQUENCE_TOKENS, seed=config.run.seed),
        seed=config.run.seed,
    )
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


def refused(config: Config, folder: Path) -> str:
    with built(config) as run, pytest.raises(ConfigError) as stopped:
        run.replay(folder)
    return str(stopped.value)


def test_a_batch_that_the_ranks_cannot_share_is_refused(
    config: Config, tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    sequence = PackedSequences(open_data(config)[0], sequence_tokens=101, seed=0).sequence(0)
    write_batch(tmp_path / "batch", {7: sequence})
    answers = ranks(2).run(refused, replace(config, parallel=ParallelConfig(dp_shard=2)), tmp_path / "batch")
    assert answers[0] == answers[1]
    assert "has 1 sequences, which 2 data-parallel groups cannot share" in answers[0]
