"""A launcher asks its ranks to stop, and ranks notice its death.

A launcher that is killed cannot end its ranks, so each process looks whether the one that started it is still there.

Linux's parent-death signal also comes when a thread of the parent ends, and is lost where the parent was dead before;
other systems have none.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from farspan.trainer.resilience.signals import WARNING_SIGNAL, StopSignal

POLL_S = 0.5

log = logging.getLogger("farspan")


@contextmanager
def when_orphaned(action: Callable[[], object], parent: int | None = None) -> Iterator[None]:
    """Call `action` in a thread if `parent`, by default the present one, stops being an ancestor inside the block."""
    expected, over = os.getppid() if parent is None else parent, threading.Event()

    def watch() -> None:
        while _is_ancestor(expected):
            if over.wait(POLL_S):
                return
        action()

    threading.Thread(target=watch, name="parent", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _is_ancestor(pid: int) -> bool:
    """Return whether a living process is the parent of this one or, on Linux, the parent of its parent and so on.

    Under SLURM a shell is between torchrun and each rank, and outlives torchrun.
    """
    ancestor = os.getppid()
    while ancestor not in (pid, 0, 1):
        try:
            # After the name in parentheses, which may hold anything: state, parent.
            ancestor = int(Path(f"/proc/{ancestor}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just died, or the system has no such files
            return False
    return ancestor == pid


@contextmanager
def stop_when_orphaned(
    stop: StopSignal, parent: int | None = None, *, has_begun: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Ask for a stop if `parent` dies inside the block, or end the process at once where nothing has begun yet."""

    def ask() -> None:
        log.info("%-12s%s", "stopping", "since the process that started this one has died")
        if has_begun():
            stop.request()
        else:
            os._exit(1)

    with when_orphaned(ask, parent):
        yield


def children_of(pid: int) -> list[int]:
    """Return the child processes of a process, on Linux."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            found += map(int, children.read_text().split())
    return found


def ask_ranks_to_stop(torchrun: int, number: int) -> bool:
    """Pass a stop signal on to the ranks of a torchrun and return whether it has any.

    Its own handler would kill them after 30 s, saved or not.
    """
    ranks = children_of(torchrun)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, number if number == WARNING_SIGNAL else signal.SIGINT)
    return bool(ranks)


def must_not_outlive_parent(*, is_rank: bool) -> bool:
    """Return whether the parent's death means that it was killed: it would have waited for this process otherwise.

    So it is for ranks of torchrun, which gives each a session of its own, and for what a script or program has started
    in its own process group. `nohup`, and `&` in a script, ask for a process that lives on: they ignore signals.
    """
    parent = os.getppid()
    try:
        if is_rank and os.getsid(parent) != os.getsid(0):
            return True
        ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGHUP, signal.SIGINT)]
        return os.getpgid(parent) == os.getpgrp() and not any(ignored)
    except OSError:  # it has just died, or the system does not tell of other sessions
        return False
