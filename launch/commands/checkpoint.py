"""`farspan checkpoint ls|verify|prune|export`."""

import argparse
from pathlib import Path

from farspan.launch.commands import models
from farspan.launch.commands.arguments import Subparsers, add_subparsers

EXIT_DAMAGED = 1


def add_parser(subparsers: Subparsers) -> None:
    commands = add_subparsers(subparsers.add_parser("checkpoint", help="list, verify, delete checkpoints"), "COMMAND")
    parser = commands.add_parser("ls", help="list the checkpoints of a run")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.set_defaults(command=_ls)

    parser = commands.add_parser("verify", help="read every byte; exit status 1 if a checkpoint is damaged")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, or one of its folders checkpoints/step_*")
    parser.set_defaults(command=_verify)

    parser = commands.add_parser("prune", help="delete old checkpoints, and those that a resumed run refused")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="keep the newest N")
    parser.add_argument("--permanent-every", type=int, default=0, metavar="N", help="also keep one every N steps")
    parser.set_defaults(command=_prune)

    models.add_export(commands)


def _ls(options: argparse.Namespace) -> int:
    from farspan.launch.checkpoints import list_checkpoints

    list_checkpoints(options.run)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from farspan.launch.checkpoints import verify

    return 0 if verify(options.folder) else EXIT_DAMAGED


def _prune(options: argparse.Namespace) -> int:
    from farspan.launch.checkpoints import prune_run

    prune_run(options.run, keep=options.keep, permanent_every=options.permanent_every)
    return 0
