"""The command line: `farspan train`, `farspan launch local`, `farspan data prepare`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from farspan.kernels.errors import ConfigError, FarspanError
from farspan.launch.env import read_ranks
from farspan.launch.local import LocalJob
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import Config
from farspan.trainer.config_io import load_config
from farspan.trainer.data import prepare
from farspan.trainer.dry_run import dry_run
from farspan.trainer.train import train

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, or 2 for an error that the user can mend."""
    options = _parse(arguments)
    ranks = Ranks()
    try:
        ranks = read_ranks()
        _set_up_logging(ranks)
        return options.command(options, ranks) or 0
    except ConfigError as error:
        # Every rank finds the same fault in the same configuration: one of them says so.
        if ranks.rank == 0:
            print(f"farspan: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except FarspanError as error:
        where = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
        print(f"farspan: {where}{error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; overrides may stand before, between and after flags, which argparse alone cannot do."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="farspan", description="Train language models on long context.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("train", help="train in this process, or as one rank under torchrun")
    _add_config_arguments(one)
    one.add_argument("--ranks", type=int, help="with --dry-run: how many ranks to pretend")
    one.set_defaults(command=_train)

    launch = commands.add_parser("launch", help="start the ranks of a run").add_subparsers(
        required=True, metavar="WHERE"
    )
    local = launch.add_parser("local", help="on this machine, under torchrun")
    _add_config_arguments(local)
    local.add_argument("--gpus-per-node", type=int, required=True, help="ranks to start; CPU processes without GPUs")
    local.set_defaults(command=_launch_local)

    data = commands.add_parser("data", help="make training data").add_subparsers(required=True, metavar="WHAT")
    prepared = data.add_parser("prepare", help="turn text into memory-mapped tokens")
    prepare.add_arguments(prepared)
    prepared.set_defaults(command=lambda options, ranks: prepare.run(options))
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML file, such as configs/demo.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    parser.add_argument("--dry-run", action="store_true", help="print everything derived and start nothing")


def _train(options: argparse.Namespace, ranks: Ranks) -> None:
    config = load_config(Config, options.config, options.overrides)
    if options.ranks is not None and not options.dry_run:
        raise ConfigError(
            f"--ranks {options.ranks} goes with --dry-run; torchrun or 'farspan launch' starts real ranks."
        )
    if options.dry_run:
        dry_run(config, options.ranks or ranks.world_size)
        return
    train(config, ranks)


def _launch_local(options: argparse.Namespace, ranks: Ranks) -> int:
    if options.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node {options.gpus_per_node} must be at least 1.")
    job = LocalJob(config=options.config, overrides=tuple(options.overrides), num_ranks=options.gpus_per_node)
    if options.dry_run:
        print(job.command_line())
        dry_run(load_config(Config, options.config, options.overrides), options.gpus_per_node)
        return 0
    return job.run()


def _set_up_logging(ranks: Ranks) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("farspan").setLevel(logging.INFO if ranks.rank == 0 else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
