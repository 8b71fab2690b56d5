"""What a resume accepts, refuses and says when the configuration has changed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import CheckpointError
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import ShuffledSequences
from farspan.trainer.toml_config import load_config
from tests.support import tiny
from tests.support.runs import asked_at_poll, records, steps
from tests.support.runs import run_alone as run

STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=STEPS)
    return replace(config, checkpoint=CheckpointConfig(every_steps=3), evaluate=EvaluateConfig(every_steps=0))


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_written(config: Config) -> None:
    run(config)
    files = [config.run.folder / name for name in ("metrics.jsonl", "config.toml")]
    before = [path.read_bytes() for path in files]
    with pytest.raises(CheckpointError, match=r"run\.seed \(11, now 12\)"):
        run(replace(config, run=replace(config.run, seed=12)))
    other = replace(config, attention=replace(config.attention, options={"causal": False}))
    for last in (STEPS, STEPS + 1):
        with pytest.raises(CheckpointError, match=r"mechanism \('Dense\(causal=True\)', now 'Dense\(causal=F"):
            run(replace(other, train=replace(other.train, steps=last)))
    assert [path.read_bytes() for path in files] == before
    # A value written out and the same as a default are equal.
    run(replace(config, attention=replace(config.attention, options={"causal": True})))


def test_a_launch_that_trains_nothing_leaves_the_configuration(config: Config) -> None:
    run(config)
    path = config.run.folder / "config.toml"
    before = path.read_bytes()
    slower = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-3))
    run(slower)
    longer = replace(slower, train=replace(slower.train, steps=STEPS + 1))
    for number in (1, 2, 3):
        run(longer, asked_at_poll(number))
    assert path.read_bytes() == before
    assert not list(config.run.folder.glob("config_*"))


def test_a_resume_with_other_settings_keeps_the_earlier_configuration(
    config: Config, log: pytest.LogCaptureFixture
) -> None:
    run(config)
    assert "changed" not in log.text
    path = config.run.folder / "config.toml"
    before = path.read_bytes()
    longer = replace(config, train=replace(config.train, steps=STEPS + 1))
    run(replace(longer, optimizer=replace(config.optimizer, learning_rate=1e-3)))
    earlier = config.run.folder / "config_until_step_4.toml"
    # Cosine to a tenth from the third of 4, or of 5 steps on: cos(pi 1/2) = 0, both at the last step.
    rates = "so that the learning rate of step 5 is 0.00055 instead of 0.001, after 0.01 in step 4"
    assert f"train.steps 4 -> 5, optimizer.learning_rate 0.01 -> 0.001, {rates}; see {earlier}\n" in log.text
    assert records(config.run.folder)[-2]["learning_rate"] == pytest.approx(0.00055)
    assert earlier.read_bytes() == before
    assert load_config(Config, path).optimizer.learning_rate == 1e-3


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
    # Two steps of two sequences are left.
    assert f" = {4 * other.data.sequence_tokens:,} of " in log.text
    assert log.text.count("; 0 are read") == 1
    # The next resume goes on there, whether the change is still accepted or not.
    log.clear()
    run(replace(other, train=replace(other.train, steps=STEPS + 3)))
    assert "first sequence" not in log.text
    assert read == [0, 1, 2, 3, 4, 5]


def test_epochs_count_what_other_batches_have_read(config: Config, log: pytest.LogCaptureFixture) -> None:
    run(config)
    run(replace(config, train=replace(config.train, steps=STEPS + 1)))
    assert "are read" not in log.text
    run(replace(config, train=replace(config.train, steps=STEPS + 3, sequences_per_step=6)))
    read = 2 * (STEPS + 1)
    assert f" = {(read + 2 * 6) * config.data.sequence_tokens:,} of " in log.text
    assert f"sequences; {read} are read" in log.text


def test_a_missing_configuration_is_said(config: Config, log: pytest.LogCaptureFixture) -> None:
    run(config)
    (config.run.folder / "config.toml").unlink()
    run(replace(config, train=replace(config.train, steps=STEPS + 1)))
    assert f"config.toml, which was missing: what has changed since step {STEPS} is not known" in log.text
    assert load_config(Config, config.run.folder / "config.toml").train.steps == STEPS + 1
