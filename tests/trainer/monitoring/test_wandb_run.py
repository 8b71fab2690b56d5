"""Weights & Biases: the real package offline, on ranks; and a package that fails."""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.monitoring.wandb_run import MetricsConfig
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.runs import records, run, steps

pytestmark = pytest.mark.filterwarnings("ignore")


def config_of(data: Path, folder: Path, *, steps: int, project: str | None = "long") -> Config:
    config = tiny.config(data, folder, ParallelConfig(dp_shard=0), steps=steps)
    return replace(
        config,
        checkpoint=CheckpointConfig(every_steps=3),
        evaluate=EvaluateConfig(every_steps=2, sequences=1),
        metrics=MetricsConfig(wandb_project=project),
    )


def children() -> list[str]:
    """The command lines of this process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{os.getpid()}\n" in (path / "status").read_text():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return found


def train_on_rank(config: Config, environment: Mapping[str, str]) -> tuple[bool, list[str]]:
    """On a rank: train; return whether wandb is imported, and the processes left behind."""
    before = children()
    with mock.patch.dict(os.environ, environment):
        run(config)
    return "wandb" in sys.modules, [command for command in children() if command not in before]


@contextmanager
def listening(folder: Path) -> Iterator[tuple[dict[str, str], socket.socket]]:
    """Yield an environment in which all that wandb would send, directly or by a proxy, comes to a socket here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"WANDB_BASE_URL": here, "HTTP_PROXY": here, "HTTPS_PROXY": here, "WANDB_SILENT": "true"}
        for name in ("CONFIG", "CACHE", "DATA"):
            environment[f"WANDB_{name}_DIR"] = str(folder / name)
        yield environment, server


def logged(path: Path) -> list[Any]:
    """Records of a .wandb file: protocol buffers after 4 bytes of sum, 2 of size, 1 of type; in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (rest := -at % 32768) < 7:
            at += rest
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def test_a_run_is_kept_offline_and_continued_under_its_id(tiny_data: Path, tmp_path: Path, ranks: Pools) -> None:
    folder = tmp_path / "run"
    without = config_of(tiny_data, tmp_path / "without", steps=3, project=None)
    with listening(tmp_path) as (environment, server):
        environment["WANDB_MODE"] = "offline"
        assert [imported for imported, _ in ranks(2).run(train_on_rank, without, environment)] == [False, False]
        for last in (3, 5):
            config = config_of(tiny_data, folder, steps=last)
            outcomes = ranks(2).run(train_on_rank, config, environment)
            assert outcomes == [(True, []), (False, [])], "the first rank only, which leaves no process"
        with pytest.raises(BlockingIOError):
            server.accept()
    run_id = (folder / "wandb_run_id").read_text()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    history: dict[int, dict[str, Any]] = {}
    for path, last in zip(files, (3, 5), strict=True):
        found = logged(path)
        (start,) = [record.run for record in found if record.HasField("run")]
        assert (start.run_id, start.project, start.display_name) == (run_id, "long", "run")
        settings = {item.key: item.value_json for item in start.config.update}
        assert (settings["train.steps"], settings["run.seed"]) == (str(last), "11")
        for record in found:
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if values:
                assert record.history.step.num not in history
                history[record.history.step.num] = {key: float(value) for key, value in values.items()}
    assert list(history) == [1, 2, 3, 4, 5]
    for record in records(folder):
        prefix, key = ("eval", "eval_loss") if "eval_loss" in record else ("train", "loss")
        assert history[record["step"]][f"{prefix}/loss"] == record[key]


def test_a_server_that_does_not_answer_costs_a_while_only(tiny_data: Path, tmp_path: Path, ranks: Pools) -> None:
    with listening(tmp_path) as (environment, _):
        environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "1", "WANDB_ERROR_REPORTING": "false"}
    outcomes = ranks(2).run(train_on_rank, config_of(tiny_data, tmp_path / "run", steps=3), environment)
    assert [left for _, left in outcomes] == [[], []]
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    sent = [record.history.step.num for record in logged(path) if record.HasField("history")]
    assert sent == steps(tmp_path / "run", "loss") == [1, 2, 3]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A package in place of wandb, of which a test makes parts fail."""
    made = SimpleNamespace(log=mock.Mock(), finish=mock.Mock())
    package = SimpleNamespace(init=mock.Mock(return_value=made), run=made, teardown=mock.Mock(), __spec__=mock.Mock())
    monkeypatch.setitem(sys.modules, "wandb", package)  # pyright: ignore[reportArgumentType]
    return package


BROKEN = RuntimeError("no answer\nfrom there")


@pytest.mark.parametrize(
    ("part", "said", "records_sent"),
    [("init", "kept offline", 0), ("log", "off", 1), ("finish", "off", 5), ("teardown", "off", 5)],
)
def test_a_failure_of_wandb_ends_its_part_only(
    tiny_data: Path, tmp_path: Path, package: SimpleNamespace, log: pytest.LogCaptureFixture, part: str, said: str,
    records_sent: int,
) -> None:  # fmt: skip
    setattr(package.run if part in ("log", "finish") else package, part, mock.Mock(side_effect=BROKEN))
    train(config_of(tiny_data, tmp_path / "run", steps=3), Ranks(), StopSignal())
    assert steps(tmp_path / "run", "loss") == [1, 2, 3]
    assert f"wandb       {said}: RuntimeError: no answer\n" in log.text
    assert package.run.log.call_count == records_sent
    if part == "init":
        # Without an answer it is tried offline, then given up.
        assert [call.kwargs["mode"] for call in package.init.call_args_list] == [None, "offline"]


def test_without_a_connection_the_run_is_kept_offline(
    tiny_data: Path, tmp_path: Path, package: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_offline(*, mode: str | None, **_: Any) -> SimpleNamespace:
        assert not sys.stdin.isatty(), "wandb would ask for a key"
        if mode is None:
            raise BROKEN
        return package.run

    package.init.side_effect = needs_offline
    monkeypatch.setattr(sys, "stdin", mock.Mock(isatty=lambda: True))
    train(config_of(tiny_data, tmp_path / "run", steps=3), Ranks(), StopSignal())
    assert [call.kwargs["step"] for call in package.run.log.call_args_list] == [1, 2, 2, 3, 3]
    assert sys.stdin.isatty()
    package.run.finish.assert_called_once_with(exit_code=0)


def test_a_fresh_start_is_another_run(tiny_data: Path, tmp_path: Path, package: SimpleNamespace) -> None:
    config = config_of(tiny_data, tmp_path / "run", steps=3)
    again = config_of(tiny_data, tmp_path / "run", steps=4)
    for each in (config, again):
        train(each, Ranks(), StopSignal())
    for path in sorted((tmp_path / "run" / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    train(config, Ranks(), StopSignal())
    first, second, third = (call.kwargs["id"] for call in package.init.call_args_list)
    assert first == second != third
