"""`farspan train`: one rank, alone or under torchrun."""

import argparse
import logging
from contextlib import ExitStack
from pathlib import Path

from farspan.errors import ConfigError, FarspanError
from farspan.launch.commands.arguments import Subparsers, add_command, add_config_arguments, config_of, print_dry_run
from farspan.launch.env import (
    choose_gloo_interface,
    is_rank,
    read_ranks,
    record_nccl_in,
    report_to_torchrun,
    set_deepspeed_defaults,
    set_device_defaults,
    take_launcher,
)
from farspan.launch.output import print_error
from farspan.launch.parent import must_not_outlive_parent, stop_when_orphaned
from farspan.trainer.resilience.signals import (
    EXIT_FAILED,
    EXIT_UNFIT,
    EXIT_USER_ERROR,
    EXIT_WARNED,
    StopSignal,
    announce,
)

log = logging.getLogger("farspan")


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "train", run, "train in this process, or as one rank under torchrun")
    add_config_arguments(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: the number of ranks to assume")


def run(options: argparse.Namespace) -> int:
    if options.ranks is not None and not options.dry_run:
        raise ConfigError(
            f"--ranks {options.ranks} goes with --dry-run; torchrun or 'farspan launch' starts real ranks."
        )
    if options.dry_run:
        print_dry_run(options, 1 if options.ranks is None else options.ranks, flag="--ranks")
        return 0
    set_device_defaults()
    ranks = read_ranks()
    log.setLevel(logging.INFO if ranks.rank == 0 else logging.WARNING)
    # Under 'launch local' the launcher announces the stop, once for all ranks.
    first = announce if ranks.world_size == 1 else lambda number: None
    stop = StopSignal(first=first)
    with ExitStack() as stack:
        launcher = take_launcher()
        if launcher is not None or must_not_outlive_parent(is_rank=is_rank()):
            # Its thread starts while signals are blocked, and leaves them to the main thread.
            stack.enter_context(stop_when_orphaned(stop, launcher, has_begun=_is_connected))
        stack.enter_context(stop)
        # The handlers come before these imports, which take seconds: a signal in the meantime is not lost.
        from farspan.parallel.ranks import NotConnectedError
        from farspan.trainer.resilience.preflight import BadNodeError
        from farspan.trainer.train import train

        choose_gloo_interface(ranks)
        try:
            config = config_of(options)
            record_nccl_in(Path(config.run.folder))
            set_deepspeed_defaults(ranks, config.train.device)
            wants_requeue = train(config, ranks, stop)
        except FarspanError as error:
            is_connected = not isinstance(error, NotConnectedError)
            # `train` raises the same error on all ranks.
            if ranks.rank == 0 or not is_connected:
                print_error(error)
            report_to_torchrun(f"farspan: {error}")
            if isinstance(error, BadNodeError):
                return EXIT_UNFIT
            # A scheduler may find the ranks in time, or on other nodes, if it starts the run again.
            return EXIT_USER_ERROR if is_connected or ranks.job is None else EXIT_FAILED
    return EXIT_WARNED if wants_requeue else 0


def _is_connected() -> bool:
    """Return whether ranks have met. Before, they wait for each other, for ever if the launcher's store has died."""
    from torch.distributed import is_initialized

    return is_initialized()
