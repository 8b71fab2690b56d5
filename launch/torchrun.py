"""torchrun without its own report: ranks report errors themselves, and the first one's exit status is passed on."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from socket import gaierror
from typing import TYPE_CHECKING

from farspan.launch.env import job_id, take_launcher
from farspan.launch.output import print_error
from farspan.launch.parent import ask_ranks_to_stop, when_orphaned
from farspan.trainer.resilience.signals import (
    EXIT_FAILED,
    EXIT_HUNG,
    EXIT_UNFIT,
    EXIT_USER_ERROR,
    EXIT_WARNED,
    INTERRUPTED,
    KILLED,
    STOP_SIGNALS,
    announce,
)

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

REPORTED = (EXIT_USER_ERROR, EXIT_WARNED, EXIT_HUNG, EXIT_UNFIT)
"""Exit statuses of ranks that have already reported their error."""

MOMENT_S = 3
"""By how much torchrun may see the death of a rank later than those of the ranks that lost it."""


def main(arguments: list[str]) -> int:
    """Start ranks as `torchrun` does with these arguments and wait for them; return an exit status."""
    # The ranks act on signals, and torchrun ends when they do: its own handler, which would raise and kill them, must
    # never run. Blocked before torch starts threads, each of which could still take a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    launcher = take_launcher()
    if launcher is None:
        # SLURM and `farspan launch local` signal the ranks themselves. A terminal does not, as each has a session.
        threading.Thread(target=_forward_signals, name="signals", daemon=True).start()
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # Without SIGHUP, which ranks then still ignore under nohup.
    arguments = ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT", *arguments]
    try:
        # The launcher forwards stop requests. Without it torchrun is of no use; its ranks notice, save and end.
        with nullcontext() if launcher is None else when_orphaned(lambda: os._exit(1), launcher):
            run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        return _report(*_first_failure(error.failures))
    except (RendezvousError, DistError, gaierror) as error:
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0].rstrip(".")
        print_error(
            f"the ranks cannot meet ({reason}): name a port that is free, at an address that all nodes reach, and "
            "start torchrun on all of them."
        )
        # A scheduler may find the other nodes in time if it starts the run again.
        return EXIT_USER_ERROR if job_id() is None else EXIT_FAILED
    return 0


def _forward_signals() -> None:
    """Ask the ranks to stop at each signal, or end at once where there are none yet."""
    # Under nohup a hangup is ignored, but a blocked signal would still be taken from here.
    numbers = set(STOP_SIGNALS) - ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set())
    is_first = True
    while True:
        number = signal.sigwait(numbers)
        if is_first:
            announce(number)
        is_first = False
        if not ask_ranks_to_stop(os.getpid(), number):
            os._exit(INTERRUPTED)


def _first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, int]:
    """Return the rank that failed first, and its exit status.

    A rank that loses its peer fails moments later with a status of its own, and may be seen first: one that a signal
    killed, other than torchrun's SIGTERM, came before it.
    """

    def when(rank: int) -> int:
        was_killed = _signal(failures[rank].exitcode) not in (None, signal.SIGTERM)
        return failures[rank].timestamp - MOMENT_S * was_killed

    rank = min(failures, key=when)
    return rank, failures[rank].exitcode


def _signal(status: int) -> int | None:
    """Return the signal that killed a rank, also where a shell between torchrun and the rank reports it."""
    number = -status if status < 0 else status - KILLED
    return number if number in signal.valid_signals() else None


def _report(rank: int, status: int) -> int:
    """Print how a rank failed, unless the rank has; return the exit status to pass on."""
    if status in REPORTED:
        return status
    number = _signal(status)
    how = f"failed with exit status {status}" if number is None else f"was killed by {signal.Signals(number).name}"
    if number == signal.SIGKILL:
        how += " (the system does that when memory runs out)"
    print_error(f"rank {rank} {how}; the same command resumes from the last checkpoint, if there is one.")
    return status if number is None else KILLED + number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
