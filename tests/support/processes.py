"""Processes of this machine, also those of virtual nodes, which it sees too: found by their command, then signaled."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from farspan.launch.env import job_id

DEADLINE_S = 240


def act_on_signals() -> None:
    """Give programs that tests start the default actions of signals, also where this process was told to ignore them.

    nohup ignores SIGHUP, and a script SIGINT in what it starts in the background: programs inherit that, no handler.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def wait_for(condition: Callable[[], object], event: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {event}"
        time.sleep(0.02)


def find(*words: str) -> list[int]:
    """Return the processes whose command line starts with these words."""
    wanted = "\0".join(words)
    return [pid for pid, line in _command_lines() if line == wanted or line.startswith(f"{wanted}\0")]


def ranks_of(run: Path, job: str) -> dict[int, int]:
    """Return the process of each rank of a run's job, such as 17 or 17_3, by rank."""
    found = {}
    for pid, line in _command_lines():
        # Jobs of other clusters on this machine may have the same id.
        if line.split("\0")[1:4] == ["-m", "farspan.launch.cli", "train"] and f"\0{run}/submitted/" in line:
            values = dict(re.findall(r"(?:^|\0)(\w+)=([^\0]*)", _read(pid, "environ")))
            if job_id(values) == job:
                found[int(values["RANK"])] = pid
    return found


def parent_of(pid: int) -> int:
    return int(re.findall(r"^PPid:\t(\d+)", _read(pid, "status"), re.MULTILINE)[0])


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie, whose parent has not waited for it yet, does not."""
    state = re.search(r"^State:\t(\w)", _read(pid, "status"), re.MULTILINE)
    return state is not None and state[1] != "Z"


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _command_lines() -> list[tuple[int, str]]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [(pid, _read(pid, "cmdline").rstrip("\0")) for pid in pids]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
