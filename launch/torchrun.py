"""torchrun without its own report: ranks report errors themselves, and the first one's exit status is passed on."""

import logging
import signal
import sys

from farspan.trainer.resilience.signals import EXIT_HUNG, EXIT_UNFIT, EXIT_USER_ERROR, EXIT_WARNED, KILLED, STOP_SIGNALS

REPORTED = (EXIT_USER_ERROR, EXIT_WARNED, EXIT_HUNG, EXIT_UNFIT)
"""Exit statuses of ranks that have already reported their error."""


def main(arguments: list[str]) -> int:
    """Start ranks as `torchrun` does with these arguments and wait for them; return an exit status."""
    # SLURM signals every process. The ranks act on it, and torchrun ends when they do: its own handler, which would
    # raise and kill them, must never run. Blocked before torch starts threads, each of which could still take a signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _report(rank, failure.exitcode)
    return 0


def _report(rank: int, status: int) -> int:
    """Print how a rank failed, unless the rank has; return the exit status to pass on."""
    if status in REPORTED:
        return status
    if status - KILLED in signal.valid_signals():
        # The status of a shell between torchrun and the rank, which has the signal as 128 + number.
        status = KILLED - status
    how = f"failed with exit status {status}"
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            how += " (the system does that when memory runs out)"
    print(
        f"farspan: rank {rank} {how}; the same command resumes from the last checkpoint, if there is one.",
        file=sys.stderr,
    )
    return status if status > 0 else KILLED - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
