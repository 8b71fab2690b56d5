"""What a resume with other settings does with the data and the weights, in one process."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import CheckpointError
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import ShuffledSequences
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from tests.support import tiny
from tests.support.runs import steps

STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=STEPS)
    return replace(config, checkpoint=CheckpointConfig(every_steps=9), evaluate=EvaluateConfig(sequences=2))


def run(config: Config) -> None:
    train(config, Ranks(), StopSignal())


def test_weights_to_start_from_are_said_to_be_ignored_by_a_run_with_checkpoints(
    config: Config, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    run(config)
    assert "ignored" not in log.text
    longer = replace(config, train=replace(config.train, steps=STEPS + 1))
    run(replace(longer, run=replace(config.run, start_from=tmp_path / "none")))
    assert f"ignored     run.start_from={tmp_path / 'none'}: the run has checkpoints of its own" in log.text
    assert steps(config.run.folder, "loss") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["data.folder", "run.seed"])
def test_new_data_and_a_new_order_begin_at_their_first_sequence(
    config: Config, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(config)
    (tmp_path / "other").mkdir()
    other = replace(config, run=replace(config.run, seed=12))
    if name == "data.folder":
        other = replace(config, data=replace(config.data, folder=tiny.make_data(tmp_path / "other", words=19)))
    other = replace(other, train=replace(config.train, steps=STEPS + 2))
    read, sequence = [], ShuffledSequences.sequence

    def note(sequences: ShuffledSequences, index: int) -> Any:
        read.append(index)
        return sequence(sequences, index)

    monkeypatch.setattr(ShuffledSequences, "sequence", note)
    with pytest.raises(CheckpointError, match=rf"another {re.escape(name)} .*, which begins the data anew\.$"):
        run(other)
    run(replace(other, checkpoint=replace(config.checkpoint, accept_changed=(name,))))
    said = f"data        from the first sequence on, with another {name}; {2 * STEPS} sequences of the earlier order"
    assert said in log.text
    # The next resume goes on there, whether the change is still accepted or not.
    log.clear()
    run(replace(other, train=replace(other.train, steps=STEPS + 3)))
    assert "first sequence" not in log.text
    assert read == [0, 1, 2, 3, 4, 5]
