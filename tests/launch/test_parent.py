"""Whoever kills a launcher, its ranks notice and save. The ranks here do all that real ones do but train."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from farspan.launch.parent import POLL_S
from tests.support.processes import alive, parent_of, wait_for

RANK = """
import os, sys, time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from farspan.launch import cli
from farspan.launch.commands import train as command

folder, is_connected = Path(sys.argv[2]), sys.argv[3] == "connected"
alone = {"rank": 0, "world_size": 1, "local_rank": 0, "job": None}

def train(config, ranks, stop):
    assert "torch" not in sys.modules
    (folder / f"part{ranks.rank}").write_text(f"{os.getpid()} {os.getppid()}")
    (folder / f"part{ranks.rank}").rename(folder / f"pids{ranks.rank}")
    while not (stop.requested and is_connected):
        time.sleep(0.01)
    (folder / f"saved{ranks.rank}").touch()
    return False

# In place of modules that import torch, which costs more than all else here.
for name, values in {
    "parallel.ranks": {"NotConnectedError": OSError, "Ranks": lambda **values: SimpleNamespace(**(alone | values))},
    "trainer.resilience.preflight": {"BadNodeError": OSError},
    "trainer.train": {"train": train},
}.items():
    module = sys.modules[f"farspan.{name}"] = ModuleType(name)
    vars(module).update(values)
config = SimpleNamespace(run=SimpleNamespace(folder=folder), train=SimpleNamespace(device="cpu"))
command.config_of, command._is_connected = lambda options: config, lambda: is_connected
cli.run_and_exit()
"""
LAUNCH = """
import shlex, sys
from pathlib import Path
from farspan.launch.local import LocalJob
LocalJob._rank_arguments = lambda job: {arguments}
sys.exit(LocalJob(config=Path("unused"), overrides=(), num_ranks=2).run())
"""
IN_SHELLS = LAUNCH.format(arguments="['--no-python', 'sh', '-c', shlex.join([sys.executable, *sys.argv[1:]]) + '; :']")
LAUNCH = LAUNCH.format(arguments="sys.argv[1:]")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@contextmanager
def started(folder: Path, program: Sequence[str], *, state: str = "connected") -> Iterator[subprocess.Popen[bytes]]:
    """Start a program that starts `rank.py train FOLDER STATE`, wait until its ranks train, and kill what is left."""
    (folder / "rank.py").write_text(RANK)
    command = [*program, str(folder / "rank.py"), "train", str(folder), state]
    if program[0] == "sh":
        command = ["sh", "-c", f"{shlex.join(command[1:])}; :"]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for path in folder.glob("pids*"):
            for pid in map(int, path.read_text().split()):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def pids(folder: Path, rank: int) -> tuple[int, int]:
    """Return a rank's process and its parent, once it trains."""
    wait_for((folder / f"pids{rank}").exists, f"the start of rank {rank}")
    own, parent = map(int, (folder / f"pids{rank}").read_text().split())
    return own, parent


@pytest.mark.parametrize("victim", ["launcher", "shell", "torchrun"])
def test_ranks_of_a_launcher_that_is_killed_save_and_end(tmp_path: Path, victim: str) -> None:
    shell = ["sh"] if victim == "shell" else []
    with started(tmp_path, [*shell, sys.executable, "-c", LAUNCH]) as process:
        (first, torchrun), (second, _) = pids(tmp_path, 0), pids(tmp_path, 1)
        os.kill(torchrun if victim == "torchrun" else process.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, (first, second, torchrun))), "the end of all")
        assert [(tmp_path / f"saved{rank}").exists() for rank in range(2)] == [True, True]
        if victim == "torchrun":
            assert process.wait() == 137
            assert "farspan: torchrun was killed by SIGKILL" in (tmp_path / "errors").read_text()


def test_a_hangup_reaches_nothing_that_nohup_starts(tmp_path: Path) -> None:
    with started(tmp_path, ["nohup", sys.executable, "-c", LAUNCH]) as process:
        (first, torchrun), (second, _) = pids(tmp_path, 0), pids(tmp_path, 1)
        for pid in (process.pid, torchrun, first, second):
            os.kill(pid, signal.SIGHUP)
        # Ranks act on the other stop signals.
        os.kill(first, signal.SIGUSR1)
        wait_for((tmp_path / "saved0").exists, "the end of the first rank")
        assert [alive(pid) for pid in (process.pid, torchrun, second)] == [True] * 3
        process.terminate()
        assert process.wait() == 0
        assert (tmp_path / "saved1").exists()


def test_a_shell_between_torchrun_and_a_rank_hides_no_death(tmp_path: Path) -> None:
    """As under SLURM, where shells write down what ranks print."""
    with started(tmp_path, [sys.executable, "-c", IN_SHELLS]):
        (first, shell), (second, _) = pids(tmp_path, 0), pids(tmp_path, 1)
        torchrun = parent_of(shell)
        time.sleep(2 * POLL_S)
        assert not list(tmp_path.glob("saved*"))
        os.kill(torchrun, signal.SIGKILL)
        wait_for(lambda: not any(map(alive, (first, second))), "the end of the ranks")
        assert [(tmp_path / f"saved{rank}").exists() for rank in range(2)] == [True, True]


@pytest.mark.parametrize("state", ["connected", "connecting"])
def test_ranks_of_a_plain_torchrun_that_is_killed_end_too(tmp_path: Path, state: str) -> None:
    with started(tmp_path, TORCHRUN, state=state) as process:
        ranks = [pids(tmp_path, rank)[0] for rank in range(2)]
        process.kill()
        wait_for(lambda: not any(map(alive, ranks)), "the end of the ranks")
        # Those that still wait for each other have nothing to save.
        saved = state == "connected"
        assert [(tmp_path / f"saved{rank}").exists() for rank in range(2)] == [saved, saved]


def test_a_process_alone_does_not_outlive_its_shell(tmp_path: Path) -> None:
    with started(tmp_path, ["sh", sys.executable]) as shell:
        process, parent = pids(tmp_path, 0)
        assert parent == shell.pid
        shell.kill()
        wait_for(lambda: not alive(process), "the end of the process")
        assert (tmp_path / "saved0").exists()


LATE = """
import os, sys, time
from farspan.launch.parent import when_orphaned
with when_orphaned(lambda: os._exit(3), parent={parent}):
    time.sleep(60)
"""


def test_a_parent_that_died_before_the_process_looked_counts() -> None:
    assert subprocess.run([sys.executable, "-c", LATE.format(parent=os.getpid() + 1)]).returncode == 3


ASK = "from farspan.launch.parent import must_not_outlive_parent as ask; print(ask(is_rank={is_rank}), flush=True)"


@pytest.mark.parametrize(
    ("script", "is_rank", "expected"),
    [
        ("{ask}", False, True),
        ("{ask} & wait", False, False),
        ("trap '' HUP; {ask}", False, False),  # as nohup does
        ("setsid {ask}", False, False),
        ("setsid {ask}", True, True),  # as torchrun does
        ("trap '' HUP INT; setsid {ask}", True, True),
        ("{ask} & wait", True, False),  # ranks that a script starts
    ],
)
def test_what_must_not_outlive_its_parent(script: str, is_rank: bool, expected: bool) -> None:
    ask = shlex.join([sys.executable, "-c", ASK.format(is_rank=is_rank)])
    # A second command, or the shell would become the first. Not its own group's leader, or setsid would fork.
    done = subprocess.run(["sh", "-c", f"{script.format(ask=ask)}; :"], capture_output=True, text=True)
    assert done.stdout == f"{expected}\n", done.stderr
