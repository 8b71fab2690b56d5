"""Traces of chosen steps and ranks: what is in them, where they lie, and that no other step pays for them."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from farspan.errors import ConfigError, TrainingError
from farspan.parallel.mesh import Degrees, ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer import train as module
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.monitoring import profiler
from farspan.trainer.monitoring.profiler import ProfileConfig, Profiler
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import fill_in
from farspan.trainer.train import train
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.runs import run

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Config:
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=6)
    evaluation = EvaluateConfig(every_steps=2, sequences=1)
    return replace(config, checkpoint=CheckpointConfig(every_steps=3), evaluate=evaluation)


def with_profile(config: Config, steps: tuple[int, ...], *, until: int) -> Config:
    return replace(config, train=replace(config.train, steps=until), profile=ProfileConfig(steps=steps))


def traces(config: Config) -> dict[str, list[dict[str, Any]]]:
    """The events of each trace in a run's folder, by its path."""
    folder = config.run.folder / "profile"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: json.loads(gzip.decompress((folder / name).read_bytes()))["traceEvents"] for name in found}


def steps_of(events: list[dict[str, Any]]) -> list[str]:
    marks = {event["ts"]: event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    return [marks[time] for time in sorted(marks)]


def train_noting(config: Config) -> list[str]:
    """Train; return the order in which updates began and the profiler warmed up, began and ended."""
    order: list[str] = []
    update = module.update

    class Noted(profiler.profile):
        def prepare_trace(self) -> None:
            order.append("warm up")
            super().prepare_trace()

        def start_trace(self) -> None:
            order.append("record")
            super().start_trace()

        def stop_trace(self) -> None:
            order.append("end")
            super().stop_trace()

    def noted(*arguments: Any) -> Any:
        order.append(str(arguments[-1].step + 1))
        return update(*arguments)

    with mock.patch.object(profiler, "profile", Noted), mock.patch.object(module, "update", noted):
        train(config, Ranks(), StopSignal())
    return order


def test_chosen_steps_are_traced_also_after_a_resume(config: Config) -> None:
    first = with_profile(config, (2, 3, 5), until=6)
    order = ["warm up", "1", "record", "2", "3", "end", "warm up", "4", "record", "5", "end", "6"]
    assert train_noting(first) == order
    found = traces(first)
    assert {name: steps_of(events) for name, events in found.items()} == {
        "step_00000002/rank_0.trace.json.gz": ["ProfilerStep#2", "ProfilerStep#3"],
        "step_00000005/rank_0.trace.json.gz": ["ProfilerStep#5"],
    }
    for events in found.values():
        start = min(event["ts"] for event in events if event["name"].startswith("ProfilerStep#"))
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        assert {"aten::mm", "aten::embedding"} <= {event["name"] for event in operators}
        # Nothing of the warm-up is in it.
        assert min(event["ts"] for event in operators) >= start

    # Resumed after step 3, whose trace is there: step 4 has no step before it in this process to warm up in, a second
    # trace of step 5 has a name of its own, and a step that is gone by is not waited for.
    shutil.rmtree(config.run.folder / "checkpoints" / "step_00000006")
    again = with_profile(config, (2, 4, 5), until=5)
    assert train_noting(again) == ["warm up", "record", "4", "5", "end"]
    shutil.rmtree(config.run.folder / "checkpoints" / "step_00000005")
    assert train_noting(with_profile(config, (2, 5), until=5)) == ["warm up", "4", "record", "5", "end"]
    assert {name: steps_of(events) for name, events in traces(first).items()} == {
        "step_00000002/rank_0.trace.json.gz": ["ProfilerStep#2", "ProfilerStep#3"],
        "step_00000004/rank_0.trace.json.gz": ["ProfilerStep#4", "ProfilerStep#5"],
        "step_00000005/rank_0.2.trace.json.gz": ["ProfilerStep#5"],
        "step_00000005/rank_0.trace.json.gz": ["ProfilerStep#5"],
    }


def test_a_run_that_ends_inside_a_trace_writes_the_steps_that_it_has(config: Config) -> None:
    config = replace(config, profile=ProfileConfig(steps=(2, 3, 4, 5)))
    update = module.update

    def third_fails(*arguments: Any) -> Any:
        if arguments[-1].step == 2:
            raise TrainingError("no more")
        return update(*arguments)

    with mock.patch.object(module, "update", third_fails), pytest.raises(TrainingError, match="no more"):
        train(config, Ranks(), StopSignal())
    assert {name: steps_of(events) for name, events in traces(config).items()} == {
        "step_00000002/rank_0.trace.json.gz": ["ProfilerStep#2", "ProfilerStep#3"]
    }


def test_each_chosen_rank_writes_its_own(tiny_data: Path, tmp_path: Path, ranks: Pools) -> None:
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(context=2), steps=3)
    config = replace(config, profile=ProfileConfig(steps=(2,), ranks=(0, 1)))
    ranks(2).run(train_quietly, config)
    found = traces(config)
    assert list(found) == [f"step_00000002/rank_{rank}.trace.json.gz" for rank in (0, 1)]
    for rank, name in enumerate(found):
        trace = json.loads(gzip.decompress((config.run.folder / "profile" / name).read_bytes()))
        assert (trace["distributedInfo"]["rank"], trace["distributedInfo"]["world_size"]) == (rank, 2)
        assert any(event["name"].startswith("gloo:") for event in found[name])
    shutil.rmtree(config.run.folder)
    ranks(2).run(train_quietly, replace(config, profile=ProfileConfig(steps=(2,), ranks=(1,))))
    assert list(traces(config)) == ["step_00000002/rank_1.trace.json.gz"]


def train_quietly(config: Config) -> None:
    run(config)


def test_without_chosen_steps_there_is_no_profiler(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "profile", mock.Mock(side_effect=AssertionError("profiled")))
    train(with_profile(config, (), until=3), Ranks(), StopSignal())
    other = Profiler(ProfileConfig(steps=(1, 2), ranks=(1,)), config.run.folder, CPU, rank=0, resumed_step=0)
    for step in (1, 2):
        with other.step(step):
            pass
    assert not (config.run.folder / "profile").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no trace")])
def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    config: Config, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(profiler.profile, "export_chrome_trace", mock.Mock(side_effect=error))
    train(with_profile(config, (1,), until=3), Ranks(), StopSignal())
    assert f"of step 1 on rank 0 could not be written: {error}" in log.text
    assert "finished    at step 3" in log.text


def test_cuda_memory_is_recorded_for_the_chosen_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of torch, in their order: there is no GPU here."""
    calls: list[Any] = []
    recorded = lambda enabled="all", max_entries=0: calls.append((enabled, max_entries))  # noqa: E731
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", recorded)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    config = ProfileConfig(steps=(2,), memory=True)
    profiled = Profiler(config, tmp_path, CPU, rank=0, resumed_step=0)
    for step in (1, 2, 3):
        with profiled.step(step):
            calls.append(step)
    profiled.close()
    assert calls == [("all", profiler.MAX_ALLOCATIONS), 1, 2, "rank_0.memory.pickle", (None, 0), 3]


def test_memory_needs_a_gpu(config: Config) -> None:
    config = replace(config, profile=ProfileConfig(steps=(2,), memory=True))
    degrees = Degrees.resolve(config.parallel, 1)
    with pytest.raises(ConfigError, match=r"profile\.memory=true records CUDA memory.*profile\.memory=false"):
        fill_in(config, degrees, CPU, 264)
