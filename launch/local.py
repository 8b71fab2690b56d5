"""Ranks on this machine: torchrun runs in its own session, so that the launcher alone gets Ctrl-C and forwards it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from farspan.launch.env import environment_with_threads
from farspan.launch.output import print_error
from farspan.launch.parent import ask_ranks_to_stop, children_of, must_not_outlive_parent, stop_when_orphaned
from farspan.trainer.resilience.signals import (
    INTERRUPTED,
    KILLED,
    StopSignal,
    announce,
    stop_signals_blocked,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalJob:
    """`num_ranks` processes that run `farspan train config overrides`."""

    config: Path
    overrides: tuple[str, ...]
    num_ranks: int

    def command_line(self) -> str:
        """Return the command that starts the ranks, for a shell."""
        return f"OMP_NUM_THREADS={self.threads_per_rank()} {shlex.join(self._torchrun())}"

    def threads_per_rank(self) -> int:
        return max(len(os.sched_getaffinity(0)) // self.num_ranks, 1)

    def run(self) -> int:
        """Start the ranks, wait for them and return 0 if all succeeded, else the exit status of the first that failed.

        The first SIGINT, SIGTERM or SIGUSR1, or the death of the shell that waits for this process, asks the ranks to
        save and exit. A second one, or one before any rank has started, kills them: status 130. If this process or
        torchrun is killed, the ranks notice and save too.
        """
        torchrun: subprocess.Popen[bytes] | None = None

        def forward(number: int) -> None:
            announce(number)
            # torchrun itself blocks signals.
            if not _is_running(torchrun) or not ask_ranks_to_stop(torchrun.pid, number):
                # It has not started any ranks yet, so there is nothing to save.
                _kill(torchrun)

        # Asked before the handlers are installed, as it depends on what was ignored.
        is_waited_for = must_not_outlive_parent(is_rank=False)
        with StopSignal(first=forward, again=lambda number: _kill(torchrun)) as stop:
            try:
                # Ranks inherit the block: a signal stays pending until the rank has installed its handler.
                with stop_signals_blocked():
                    if stop.requested:
                        return INTERRUPTED
                    torchrun = subprocess.Popen(
                        self._torchrun(),
                        env=environment_with_threads(self.threads_per_rank()),
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                with stop_when_orphaned(stop) if is_waited_for else nullcontext():
                    status = torchrun.wait()
                if status >= 0:
                    return status
                if stop.requested:
                    return INTERRUPTED
                print_error(
                    f"torchrun was killed by {signal.Signals(-status).name}; its ranks save and end, then the same "
                    "command resumes."
                )
                return KILLED - status
            finally:
                _kill(torchrun)

    def _torchrun(self) -> list[str]:
        # Without an address, ranks would look for each other under the name of this machine, which need not resolve.
        program = [sys.executable, "-m", "farspan.launch.torchrun", "--standalone", "--local-addr=127.0.0.1"]
        return [*program, "--nproc-per-node", str(self.num_ranks), *self._rank_arguments()]

    def _rank_arguments(self) -> list[str]:
        return ["-m", "farspan.launch.cli", "train", str(self.config), *self.overrides]


def _is_running(torchrun: subprocess.Popen[bytes] | None) -> TypeGuard[subprocess.Popen[bytes]]:
    return torchrun is not None and torchrun.poll() is None


def _kill(torchrun: subprocess.Popen[bytes] | None) -> None:
    """Kill torchrun and its ranks, each of which leads its own session."""
    if not _is_running(torchrun):
        return
    for pid in (*children_of(torchrun.pid), torchrun.pid):
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(pid), signal.SIGKILL)
