"""The loop, in one process: what is on record after stops and resumes, and what a rerun of a finished run does."""

import os
import re
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from farspan.errors import CheckpointError, ConfigError, DataError, TrainingError
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import evaluate, metrics
from farspan.trainer import train as module
from farspan.trainer.batch import BatchBuilder, MicroBatch
from farspan.trainer.checkpoint import checkpointer, shards
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import IGNORED, PackedSequence, ShuffledSequences
from farspan.trainer.data.source import META_FILE, TOKENS_FILE, SplitWriter
from farspan.trainer.data.tokenizer import load_tokenizer
from farspan.trainer.resilience.lock import lock_folder
from farspan.trainer.resilience.watchdog import Watchdog
from farspan.trainer.resolve import open_all_data, open_data
from farspan.trainer.state import TrainState
from farspan.trainer.toml_config import load_config
from tests.support import tiny
from tests.support.checkpoint_ranks import flip
from tests.support.processes import DEADLINE_S
from tests.support.runs import AskedWhen, asked_at_poll, records, steps
from tests.support.runs import run_alone as run

STEPS = 4
disk_full = mock.Mock(side_effect=OSError(28, "No space left on device"))
STEP_FIELDS = {"step", "loss", "grad_norm", "tokens_per_s", "mfu", "peak_memory_bytes", "comm_bytes"}
EVALUATION_FIELDS = {"step", "eval_loss", "eval_tokens", "bits_per_byte", "unigram_bits_per_byte", "loss_by_position"}

pytestmark = pytest.mark.filterwarnings("ignore")


def write_split(folder: Path, lengths: list[int]) -> None:
    """Write documents of these lengths without their end tokens, as older versions did for 0 too."""
    with SplitWriter(folder, tokenizer=load_tokenizer("bytes")) as writer:
        for length in lengths:
            writer.add(np.arange(length), num_bytes=max(length, 1))
        writer.finish()


def asked_after_step(step: int, config: Config, *, is_preempted: bool = False) -> AskedWhen:
    path = config.run.folder / "metrics.jsonl"
    return AskedWhen(lambda: path.exists() and f'"step": {step}' in path.read_text(), is_preempted=is_preempted)


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=STEPS)
    return replace(
        config, checkpoint=CheckpointConfig(every_steps=3, keep=9), evaluate=EvaluateConfig(every_steps=2, sequences=2)
    )


def done(config: Config) -> tuple[list[int], list[int], list[int]]:
    """The steps that were trained, evaluated and saved."""
    folder = config.run.folder
    saved = sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("*"))
    return steps(folder, "loss"), steps(folder, "eval_loss"), saved


def without_times(config: Config) -> list[dict[str, Any]]:
    vary = {"tokens_per_s", "mfu", "peak_memory_bytes", "step_s"}
    return [{name: record[name] for name in record.keys() - vary} for record in records(config.run.folder)]


def test_batches_without_labels_are_skipped_and_end_nothing(config: Config) -> None:
    """Sequences that hold end tokens only."""
    folder = config.run.folder.parent / "tokens"
    write_split(folder / "train", [0] * 60 + [12])
    write_split(folder / "validation", [0] * 12 + [3])
    skip, train = replace(config.skip, max_consecutive_skips=0), replace(config.train, steps=8)
    data = replace(config.data, folder=folder, sequence_tokens=6)
    config = replace(config, data=data, train=train, skip=skip)
    run(config)
    assert done(config)[:2] == ([*range(1, 9)], [2, 4, 6, 8])
    trained = [record for record in records(config.run.folder) if "loss" in record]
    for before, record in pairwise([{"tokens": 0, "skipped": 0}, *trained]):
        is_labeled = record["tokens"] > before["tokens"]
        assert (record["loss"] is not None) == is_labeled
        assert record["skipped"] == before["skipped"] + (not is_labeled)
        assert record.get("skipped_since") == (None if is_labeled else "no token of its sequences has a label")
    assert 0 < trained[-1]["skipped"] < 8


def test_an_undisturbed_run(config: Config, log: pytest.LogCaptureFixture) -> None:
    run(config)
    assert done(config) == ([1, 2, 3, 4], [2, 4], [3, 4])
    for record in records(config.run.folder):
        fields = EVALUATION_FIELDS if "eval_loss" in record else STEP_FIELDS
        assert fields <= record.keys()
        assert all(value is not None for value in record.values())
    drawn = open_all_data(config)[1]["eval"]
    measured_on = sum(int((drawn.data.sequence(index).labels != IGNORED).sum()) for index in drawn.indexes)
    assert {record["eval_tokens"] for record in records(config.run.folder) if "eval_loss" in record} == {measured_on}
    assert f"held out    eval: 2 of {len(drawn.data)} sequences of {drawn.source.folder}" in log.text
    assert f" over {measured_on} tokens" in log.text
    first, last = (record for record in records(config.run.folder) if record["step"] in (1, 4) and "loss" in record)
    # Nothing is learned before the first update: ln 264; the text is simple.
    assert first["loss"] == pytest.approx(5.58, abs=0.2)
    assert last["loss"] < first["loss"] - 0.3
    # Two sequences of 101 tokens a step, each once; the last token of a document has no label.
    data = ShuffledSequences(open_data(config)[0], sequence_tokens=101, seed=config.run.seed)
    labeled = [int((data.sequence(index).labels != IGNORED).sum()) for index in range(2 * STEPS)]
    seen = [record["tokens"] for record in records(config.run.folder) if "loss" in record]
    assert seen == [sum(labeled[: 2 * step]) for step in range(1, STEPS + 1)]
    assert len(set(labeled)) > 2
    assert first["tokens_per_s"] * first["step_s"] == pytest.approx(202)
    assert first["comm_bytes"] == sum(first["comm_bytes_by_kind"].values()) == 0


HELD_OUT = -1


class Planner:
    """Notes which sequences of the training data are planned in the thread for it, HELD_OUT of others; one may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fails_at: int | None = None) -> None:
        self.planned: list[int] = []
        build = BatchBuilder.build

        def noted(batches: BatchBuilder, sequence: PackedSequence, index: int = HELD_OUT) -> MicroBatch:
            assert threading.current_thread() is not threading.main_thread()
            self.planned.append(index)
            if index == fails_at:
                raise ValueError("the plan fails")
            return build(batches, sequence, max(index, 0))

        monkeypatch.setattr(BatchBuilder, "build", noted)

    @property
    def trained(self) -> list[int]:
        return [index for index in self.planned if index != HELD_OUT]

    def wait_for(self, sequences: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self.trained) < sequences:
            assert time.monotonic() < deadline, self.planned
            time.sleep(0.001)


def test_the_next_step_is_planned_while_this_one_computes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    planner, step, numbers = Planner(monkeypatch), module.train_step, count(1)

    def waiting(*arguments: Any, **named: Any) -> Any:
        # Two sequences a step: those of this one and of the next, but none beyond the last.
        planner.wait_for(2 * min(next(numbers) + 1, STEPS))
        return step(*arguments, **named)

    monkeypatch.setattr(module, "train_step", waiting)
    run(config)
    assert planner.trained == list(range(2 * STEPS))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize(
    ("fails_at", "what"), [(5, "training sequence 5"), (HELD_OUT, "sequence 0 of the held-out set 'eval'")]
)
def test_an_error_in_planning_ends_the_step_that_it_is_of(
    config: Config, monkeypatch: pytest.MonkeyPatch, fails_at: int, what: str
) -> None:
    planner, step = Planner(monkeypatch, fails_at=fails_at), module.train_step

    def waiting(*arguments: Any, **named: Any) -> Any:
        planner.wait_for(4)
        return step(*arguments, **named)

    monkeypatch.setattr(module, "train_step", waiting)
    with pytest.raises(TrainingError, match=rf"{what} cannot be planned \(ValueError: the plan fails\): see"):
        run(config)
    # Sequences 4 and 5 are those of step 3; after step 2 there is an evaluation.
    assert done(config)[0] == [1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_each_phase_and_each_held_out_sequence_has_its_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Counter[tuple[str, int]] = Counter()
    restart = Watchdog.restart

    def note(watchdog: Watchdog) -> None:
        given[watchdog._phase] += 1
        restart(watchdog)

    monkeypatch.setattr(Watchdog, "restart", note)
    run(config)
    once = {*(("step", step) for step in (1, 2, 3, 4)), ("save", 3)}
    # Metrics are opened after the start, unless a batch is replayed. At the end a save under way is waited for.
    twice = {("start", 0), ("save", 4)}
    evaluated = {("evaluation", 2): 3, ("evaluation", 4): 3}
    assert given == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2) | evaluated


def test_a_run_stopped_by_a_preemption_warning_asks_to_be_queued_again(config: Config) -> None:
    assert not run(config, asked_after_step(1, config))
    assert run(config, asked_after_step(3, config, is_preempted=True))
    assert done(config)[0] == [1, 2, 3]
    # A finished run has nothing to come back for, once it knows that it is finished.
    assert not run(config)
    assert not run(config, AskedWhen(lambda: False, is_preempted=True))
    assert not run(config, asked_at_poll(3, is_preempted=True))
    assert run(config, asked_at_poll(2, is_preempted=True))


def test_a_stop_after_a_step_saves_and_a_resume_goes_on(config: Config, log: pytest.LogCaptureFixture) -> None:
    undisturbed = replace(config, run=replace(config.run, folder=config.run.folder / "undisturbed"))
    run(undisturbed)
    run(config, asked_after_step(1, config))
    # Asked after the first step, noticed at the end of the second, before its evaluation.
    assert done(config) == ([1, 2], [], [2])
    assert "stopped     at step 2" in log.text
    log.clear()
    run(config)
    assert "resumed     at step 2 from" in log.text
    assert done(config) == ([1, 2, 3, 4], [2, 4], [2, 3, 4])
    assert without_times(config) == without_times(undisturbed)


def test_a_stop_is_noticed_at_the_end_of_the_step(config: Config) -> None:
    rarely = replace(config, checkpoint=CheckpointConfig(every_steps=9), evaluate=EvaluateConfig(every_steps=0))
    run(rarely, asked_after_step(2, config))
    assert done(config) == ([1, 2, 3], [], [3])


def test_a_stop_during_the_last_evaluation_leaves_it_for_the_resume(
    config: Config, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = mock.Mock(wraps=evaluate.evaluate)
    monkeypatch.setattr(evaluate, "evaluate", evaluation)
    run(config, AskedWhen(lambda: evaluation.call_count == 2))
    assert done(config) == ([1, 2, 3, 4], [2], [3, 4])
    assert "stopped     at step 4" in log.text
    log.clear()
    run(config)
    assert done(config) == ([1, 2, 3, 4], [2, 4], [3, 4])
    assert "finished    at step 4" in log.text


def test_a_stop_before_the_first_step_saves_nothing(config: Config, log: pytest.LogCaptureFixture) -> None:
    run(config, asked_at_poll(3))
    assert done(config) == ([], [], [])
    assert "stopped     before the first step" in log.text
    assert not re.search("resumes|results", log.text)


def test_a_finished_run_says_so_and_changes_nothing(config: Config, log: pytest.LogCaptureFixture) -> None:
    run(config)
    files = [path for path in config.run.folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    before = [path.read_bytes() for path in files]
    log.clear()
    run(config)
    assert "finished    already, at step 4 of train.steps=4" in log.text
    assert [path.read_bytes() for path in files] == before
    run(replace(config, train=replace(config.train, steps=5)))
    assert done(config) == ([1, 2, 3, 4, 5], [2, 4, 5], [3, 4, 5])


def test_the_configuration_left_in_the_folder_runs_the_same(config: Config, tmp_path: Path) -> None:
    auto = replace(config, attention=replace(config.attention, backend="auto"))
    run(tiny.with_model(auto, vocabulary_size=0))
    again = load_config(Config, config.run.folder / "config.toml", [f"run.folder={tmp_path / 'again'}"])
    assert again.model.vocabulary_size == 320
    run(again)
    assert without_times(again) == without_times(config)


def test_refusals_leave_no_trace(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.head_dim=7 must be even"):
        run(tiny.with_model(config, head_dim=7))
    with pytest.raises(DataError, match=r"data\.folder='.*nowhere' does not exist"):
        run(replace(config, data=replace(config.data, folder=tmp_path / "nowhere")))
    assert not config.run.folder.exists()
    assert not dist.is_initialized()


def test_two_runs_cannot_share_a_folder(config: Config) -> None:
    with lock_folder(config.run.folder), pytest.raises(ConfigError, match="is in use by process"):
        run(config)
    run(config)


def test_a_save_that_fails_ends_the_run_at_the_next_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=1))
    start, write = Checkpointer.start_saving, shards._HashedStream.write
    saves = count(1)

    def second_fails(checkpoints: Checkpointer, state: TrainState) -> None:
        number = next(saves)
        # Whatever is under way is not to fail.
        checkpoints.finish_saving()
        monkeypatch.setattr(shards._HashedStream, "write", write if number == 1 else disk_full)
        start(checkpoints, state)
        while number > 1 and not checkpoints.has_failed:
            time.sleep(0.01)

    monkeypatch.setattr(Checkpointer, "start_saving", second_fails)
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be written .*No space left"):
        run(config)
    assert done(config)[0] == [1, 2, 3]
    monkeypatch.undo()
    run(config)
    assert done(config) == ([1, 2, 3, 4], [2, 4], [1, 2, 3, 4])


def test_a_save_under_way_is_finished_when_the_run_ends_of_something_else(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=1))
    write, failed = checkpointer.write_shards, threading.Event()

    def slow(*arguments: Any) -> Any:
        failed.wait(10)
        return write(*arguments)

    def second_fails(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 2:
            failed.set()
            raise TrainingError("no token of this batch has a label")
        return step(*arguments, **named)

    step, calls = module.train_step, count(1)
    monkeypatch.setattr(module, "train_step", second_fails)
    monkeypatch.setattr(checkpointer, "write_shards", slow)
    monkeypatch.setattr(checkpointer, "LAST_MOMENT_S", 0.0)
    with pytest.raises(TrainingError, match="has a label"):
        run(config)
    assert done(config)[2] == [1]


@pytest.mark.parametrize(
    ("where", "written"), [("a record", [1, 2, 2, 3]), ("the configuration", []), ("the metrics", [])]
)
def test_a_full_disk_is_one_sentence(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str, written: list[int]
) -> None:
    write, tried = metrics.MetricsWriter._write, []

    def third_fails(writer: metrics.MetricsWriter, record: dict[str, Any]) -> None:
        tried.append(record["step"])
        write(writer, record) if len(tried) != 3 else disk_full()

    owner, name, replaced = {
        "a record": (metrics.MetricsWriter, "_write", third_fails),
        "the configuration": (metrics, "to_toml", disk_full),
        "the metrics": (metrics, "MetricsWriter", disk_full),
    }[where]
    monkeypatch.setattr(owner, name, replaced)
    with pytest.raises(TrainingError, match=r"run\.folder=.*No space left on device"):
        run(config)
    # Two steps and an evaluation, which is written in vain: the run learns that at the next step.
    assert tried == written


def test_data_that_was_changed_in_place_is_refused(config: Config, tmp_path: Path) -> None:
    run(config)
    folder = Path(shutil.copytree(config.data.folder, tmp_path / "changed"))
    flip(folder / "train" / TOKENS_FILE, 0)
    os.utime(folder / "train" / META_FILE, (1, 1))
    as_data = replace(config, data=replace(config.data, folder=folder))
    as_set = replace(config, evaluate=replace(config.evaluate, sets={"more": folder / "train"}))
    for changed in (as_data, as_set):
        with pytest.raises(DataError, match="was changed since it was prepared"):
            run(changed)
    assert done(config)[0] == [1, 2, 3, 4]


def test_missing_weights_are_found_before_the_model_is_built(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build_engine", lambda *arguments: pytest.fail("built"))
    with pytest.raises(CheckpointError, match="holds no weights"):
        run(replace(config, run=replace(config.run, start_from=tmp_path / "none")))
    assert not config.run.folder.exists()
