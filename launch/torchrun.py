"""torchrun without its report: ranks say themselves what is wrong, and the exit status of the first is passed on."""

import logging
import signal
import sys

from farspan.trainer.resilience.signals import EXIT_HUNG, EXIT_UNFIT, EXIT_USER_ERROR, EXIT_WARNED, KILLED, STOP_SIGNALS

SAID = (EXIT_USER_ERROR, EXIT_WARNED, EXIT_HUNG, EXIT_UNFIT)
"""Exit statuses of ranks that have said themselves what the matter is."""


def main(arguments: list[str]) -> int:
    """Start ranks as `torchrun` does with these arguments and wait for them; return an exit status."""
    # SLURM signals every process: ranks act on that, once they can, and torchrun ends when they do. Before torch starts
    # threads, which would let them through, and for good, since torch's handler raises.
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
    """Say how a rank failed, unless it has said so itself; return the exit status to pass on."""
    if status in SAID:
        return status
    if status - KILLED in signal.valid_signals():
        # So says a shell between torchrun and the rank.
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
