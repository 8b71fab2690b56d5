"""The arguments of `farspan checkpoint ls|verify|prune`; what they do imports torch, and is imported when they run."""

import argparse
from pathlib import Path

EXIT_DAMAGED = 1


def add_arguments(commands: "argparse._SubParsersAction") -> None:
    """Add the three commands; each sets `command`, which takes the options and returns an exit status."""
    listed = commands.add_parser("ls", help="what a run has saved")
    listed.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    listed.set_defaults(command=_ls)

    verified = commands.add_parser("verify", help="read every byte; exit status 1 where one is not as it was written")
    verified.add_argument("folder", type=Path, metavar="FOLDER", help="of a run, or of one step below checkpoints/")
    verified.set_defaults(command=_verify)

    pruned = commands.add_parser("prune", help="delete old checkpoints, and those that a resumed run refused")
    pruned.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    pruned.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest stay")
    pruned.add_argument("--permanent-every", type=int, default=0, metavar="N", help="those of every N steps stay too")
    pruned.set_defaults(command=_prune)


def _ls(options: argparse.Namespace) -> int:
    from farspan.launch.checkpoints import show

    show(options.run)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from farspan.launch.checkpoints import verify

    return 0 if verify(options.folder) else EXIT_DAMAGED


def _prune(options: argparse.Namespace) -> int:
    from farspan.launch.checkpoints import prune_run

    prune_run(options.run, keep=options.keep, permanent_every=options.permanent_every)
    return 0
