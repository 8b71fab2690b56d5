"""The local launcher: how it treats its ranks, with small programs as ranks, and a full run that is stopped halfway."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.launch.local import LocalJob
from farspan.launch.parent import children_of
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import EvaluateConfig
from farspan.trainer.toml_config import to_toml
from tests.support import tiny
from tests.support.processes import DEADLINE_S, alive, wait_for
from tests.support.runs import records

# As root: where the name of the machine does not resolve.
NAMELESS = ["unshare", "-u", "sh", "-c", 'hostname no-such-host; exec "$@"', "_"] if os.geteuid() == 0 else []
# The program of a rank in these tests; it writes its files into `folder`.
HEADER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path({folder!r})
def hang():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise torchrun waits 30 s before it kills the rank.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    (folder / f"pid{{rank}}").write_text(str(os.getpid()))
    time.sleep(600)
def wait_for(name):
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


def assert_dead(folder: Path, *names: str) -> None:
    for name in names:
        pid = int((folder / name).read_text())
        wait_for(lambda pid=pid: not alive(pid), f"the death of {name}")


def when(condition: Callable[[], object], action: Callable[[], object]) -> threading.Thread:
    """Start a thread that waits for a condition and then acts."""

    def work() -> None:
        wait_for(condition, "the condition to act")
        action()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ranks_hang(folder: Path) -> bool:
    return all(path.exists() and path.read_text() for path in (folder / "pid0", folder / "pid1"))


def test_all_ranks_run_and_know_their_rank(launch, tmp_path: Path) -> None:
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
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "farspan: rank 1 was killed by SIGKILL"),
        ("print('farspan: no', file=sys.stderr); sys.exit(2)", 2, "farspan: no\n"),
    ],
    ids=["out of memory", "refusal"],
)
def test_a_failed_rank_ends_the_others(
    launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], last_words: str, status: int, report: str
) -> None:
    assert launch(f"if rank == 0: hang()\nwait_for('pid0')\n{last_words}") == status
    err = capfd.readouterr().err
    assert err.startswith(report)
    assert err.count("\n") == 1
    assert_dead(tmp_path, "pid0")


def test_a_second_request_ends_ranks_that_do_not_stop(
    launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("farspan.trainer.resilience.signals.SAME_REQUEST_S", 0.0)

    def ask_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = when(lambda: ranks_hang(tmp_path), ask_twice)
    assert launch("hang()") == 130
    thread.join()
    assert_dead(tmp_path, "pid0", "pid1")
    assert "stopping    " in capfd.readouterr().err


def test_a_warning_reaches_the_ranks_as_a_warning_and_their_status_is_passed_on(
    launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = """
signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(75))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
hang()
"""
    thread = when(lambda: ranks_hang(tmp_path), lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert launch(program) == 75
    thread.join()
    assert "farspan: rank" not in capfd.readouterr().err


def test_a_request_before_any_rank_has_started_ends_the_launch(launch, tmp_path: Path) -> None:
    ours = signal.getsignal(signal.SIGINT)
    thread = when(
        lambda: signal.getsignal(signal.SIGINT) != ours,
        lambda: (time.sleep(0.3), os.kill(os.getpid(), signal.SIGINT)),
    )
    assert launch("hang()") == 130
    thread.join()
    assert not (tmp_path / "pid0").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_stopped_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two real ranks on a machine whose name does not resolve; Ctrl-C in the middle of training; the run continues."""
    folder, metrics = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    config = tiny.config(tiny.make_data(tmp_path), folder, ParallelConfig(context=2), steps=100_000)
    config = replace(config, evaluate=EvaluateConfig(every_steps=0, sequences=2))
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [*NAMELESS, sys.executable, "-m", "farspan.launch.cli", "launch", "local", str(tmp_path / "run.toml")]
    command += ["--gpus-per-node", "2"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        when(lambda: metrics.exists() and len(records(folder)) >= 3, lambda: process.send_signal(signal.SIGINT))
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out + err
    steps = [record["step"] for record in records(folder)]
    last = len(steps)
    assert 3 <= last < 100_000
    assert steps == list(range(1, last + 1))
    assert f"stopped     at step {last}" in out
    assert err.strip().startswith("stopping    ")
    assert err.count("\n") == 2
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step_{last:08d}"]

    # Two more steps only; on one rank, which starts sooner than two.
    assert cli.main(["train", str(tmp_path / "run.toml"), "parallel.context=1", f"train.steps={last + 2}"]) == 0
    out = capfd.readouterr().out
    assert f"resumed     at step {last} from {folder}/checkpoints/step_{last:08d}" in out
    assert f"finished    at step {last + 2}" in out
    assert [record["step"] for record in records(folder) if "loss" in record] == list(range(1, last + 3))
    assert [record["step"] for record in records(folder) if "eval_loss" in record] == [last + 2]


@pytest.mark.parametrize(("num_ranks", "threads"), [(1, 7), (2, 3), (7, 1), (8, 1)])
def test_ranks_share_the_cores_that_the_launcher_may_use(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, threads: int
) -> None:
    """Not those of the machine: a scheduler or taskset may have given it fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3, 10)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    job = LocalJob(config=Path("c"), overrides=(), num_ranks=num_ranks)
    assert job.threads_per_rank() == threads
    assert job.command_line().startswith(f"OMP_NUM_THREADS={threads} ")


CHURN = """
import subprocess, sys, threading
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
while True:
    threads = [threading.Thread(target=int) for _ in range(20)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""


def test_ranks_are_found_while_threads_of_torchrun_end() -> None:
    """Otherwise a stop request would take a run for one that has no ranks yet, and kill it unsaved."""
    with subprocess.Popen([sys.executable, "-c", CHURN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        found = [children_of(process.pid) for _ in range(200)]
        os.kill(child, signal.SIGKILL)
        process.kill()
    assert found == [[child]] * 200


SWALLOWS = """
import os, signal, sys, types
from farspan.launch import cli
from farspan.launch.commands import launch

def resolve(config, ranks):
    try:
        os.kill(os.getpid(), {number})
        for _ in range(1000): pass
    except BaseException:
        pass

launch.LocalJob.run, launch.config_of = lambda job: 0, lambda options: None
for name in ("parallel.ranks", "trainer.resolve"):
    sys.modules[f"farspan.{{name}}"] = types.SimpleNamespace(Ranks=dict, resolve=resolve)
cli.run_and_exit()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_while_torch_is_imported_is_not_lost(number: signal.Signals) -> None:
    program = [sys.executable, "-c", SWALLOWS.format(number=int(number))]
    command = ["launch", "local", "unused.toml", "--gpus-per-node", "2"]
    assert subprocess.run([*program, *command]).returncode == 130
