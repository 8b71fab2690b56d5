"""The local launcher: its care for its ranks with small programs for ranks, and a whole run that is stopped halfway."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.launch import cli
from farspan.launch.local import LocalJob
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import EvaluateConfig
from farspan.trainer.toml_config import to_toml
from tests.support import tiny

# What a rank does in these tests, told by its rank; `folder` is where it leaves word.
HEADER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path({folder!r})
def hang():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Else torchrun waits 30 s for it before it uses force.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    (folder / f"pid{{rank}}").write_text(str(os.getpid()))
    time.sleep(60)
def await_word(name):
    while not (folder / name).exists() or not (folder / name).read_text(): time.sleep(0.01)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that launches two ranks that run a program, and returns the exit status."""

    def run(program: str) -> int:
        script = tmp_path / "program.py"
        script.write_text(HEADER.format(folder=str(tmp_path)) + program)
        monkeypatch.setattr(LocalJob, "_rank_arguments", lambda job: [str(script)])
        return LocalJob(config=Path("unused"), overrides=(), num_ranks=2).run()

    return run


def assert_gone(folder: Path, *names: str) -> None:
    """Dead, though their new parent may not have taken note of it yet."""
    for name in names:
        status = Path(f"/proc/{(folder / name).read_text()}/status")
        deadline = time.monotonic() + 5
        while status.exists() and "State:\tZ" not in status.read_text():
            assert time.monotonic() < deadline, f"{name} is still alive"
            time.sleep(0.01)


def when(condition, action) -> threading.Thread:
    """Start to wait for a condition, in order to act then."""

    def work() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_all_ranks_run_and_know_who_they_are(launch, tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    status = launch(
        f"(folder / str(rank)).write_text(' '.join(os.environ[n] for n in {names!r}) + ' ' + str(os.getsid(0)))"
    )
    assert status == 0
    first, second = ((tmp_path / name).read_text().split() for name in "01")
    assert (first[:4], second[:4]) == (["0", "0", "2", "2"], ["1", "1", "2", "2"])
    # Ctrl-C in the terminal reaches the launcher alone.
    assert str(os.getsid(0)) not in (first[4], second[4])


@pytest.mark.parametrize(
    ("last_words", "status", "report"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "farspan: rank 1 was killed by SIGKILL (the system does that "),
        ("print('farspan: no', file=sys.stderr); sys.exit(2)", 2, "farspan: no\n"),
    ],
    ids=["out of memory", "refusal"],
)
def test_a_rank_that_fails_takes_the_others_with_it(
    launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], last_words: str, status: int, report: str
) -> None:
    assert launch(f"if rank == 0: hang()\nawait_word('pid0')\n{last_words}") == status
    err = capfd.readouterr().err
    assert err.startswith(report)
    assert err.count("\n") == 1
    assert_gone(tmp_path, "pid0")


def test_a_second_request_ends_ranks_that_do_not_stop(
    launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("farspan.trainer.resilience.signals.SAME_REQUEST_S", 0.0)

    def ask_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    ready = [tmp_path / "pid0", tmp_path / "pid1"]
    thread = when(lambda: all(path.exists() and path.read_text() for path in ready), ask_twice)
    assert launch("hang()") == 130
    thread.join()
    assert_gone(tmp_path, "pid0", "pid1")
    assert "stopping    after this step" in capfd.readouterr().err


def test_a_warning_reaches_the_ranks_as_one_and_their_status_is_passed_on(
    launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(75))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
hang()
"""
    ready = [tmp_path / "pid0", tmp_path / "pid1"]
    thread = when(
        lambda: all(path.exists() and path.read_text() for path in ready), lambda: os.kill(os.getpid(), signal.SIGUSR1)
    )
    assert launch(program) == 75
    thread.join()
    assert "farspan: rank" not in capfd.readouterr().err


def test_a_request_before_any_rank_has_started_ends_it_all(launch, tmp_path: Path) -> None:
    thread = when(lambda: True, lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGINT)))
    assert launch("hang()") == 130
    thread.join()
    assert not (tmp_path / "pid0").exists()


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_stopped_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two real ranks; Ctrl-C in the middle of training; the run goes on where it was."""
    folder = tmp_path / "run"
    config = tiny.config(tiny.make_data(tmp_path), folder, ParallelConfig(context=2), steps=100_000)
    config = replace(config, evaluate=EvaluateConfig(every_steps=0, sequences=2))
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "farspan.launch.cli", "launch", "local", str(tmp_path / "run.toml")]
    command += ["--gpus-per-node", "2"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        when(lambda: len(records(folder)) >= 3, lambda: process.send_signal(signal.SIGINT))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    steps = [record["step"] for record in records(folder)]
    last = len(steps)
    assert 3 <= last < 100_000
    assert steps == list(range(1, last + 1))
    assert f"stopped     at step {last}; the same command resumes" in out
    assert err == "\nstopping    after this step, with a checkpoint; Ctrl-C again after 3 seconds to end at once\n"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{last:08d}"]

    # Fewer steps than before, so that the test comes to an end; one rank, to spare the start of two.
    assert cli.main(["train", str(tmp_path / "run.toml"), "parallel.context=1", f"train.steps={last + 2}"]) == 0
    out = capfd.readouterr().out
    assert f"resumed     at step {last} from {folder}/checkpoints/step_{last:08d}" in out
    assert f"finished    at step {last + 2}" in out
    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, last + 3))
    assert [record["step"] for record in records(folder) if "eval_loss" in record] == [last + 2]
