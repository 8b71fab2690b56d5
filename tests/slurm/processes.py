"""Processes on the virtual nodes, which this machine sees all: found by what they run, held, killed."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

DEADLINE_S = 120


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def find(*words: str) -> list[int]:
    """Return the processes whose command line has these words one after another, its first word among them."""
    wanted = "\0".join(words)
    return [pid for pid, line in _command_lines() if line == wanted or line.startswith(f"{wanted}\0")]


def ranks_of(run: Path) -> dict[int, int]:
    """Return the process of each rank of a run, by rank."""
    found = {}
    for pid, line in _command_lines():
        if "farspan.launch.cli\0train\0" in line and f"{run}/submitted/" in line and "bash" not in line.split("\0")[0]:
            rank = re.search(r"(?:^|\0)RANK=(\d+)", _read(pid, "environ"))
            if rank is not None:
                found[int(rank[1])] = pid
    return found


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _command_lines() -> list[tuple[int, str]]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [(pid, _read(pid, "cmdline").rstrip("\0")) for pid in pids]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""
