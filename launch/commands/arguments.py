"""Arguments and checks that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.errors import ConfigError
from farspan.paths import expanded
from farspan.trainer.resilience.signals import EXIT_USER_ERROR

if TYPE_CHECKING:
    from farspan.trainer.config import Config

Subparsers = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """Arguments of `type=Path` may have `~` and `$NAME` in them, those of subcommands too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, lambda text: Path(expanded_argument(text)))


def expanded_argument(text: str) -> str:
    """Return an argument that may be a path or another text, expanded; its `type` for argparse."""
    # Path("") is the current folder, and what a shell makes of a quoted variable that is not set.
    if not text:
        raise argparse.ArgumentTypeError("'' is empty: was a variable not set?")
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def add_subparsers(parser: argparse.ArgumentParser, metavar: str) -> Subparsers:
    """Add commands below `parser`, which are listed if none is given."""

    def list_commands(options: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR

    parser.set_defaults(command=list_commands)
    return parser.add_subparsers(metavar=metavar)


def add_command(
    subparsers: Subparsers, name: str, command: Callable[[argparse.Namespace], int | None], text: str
) -> argparse.ArgumentParser:
    """Add a command, described by a text; it returns its exit status, None for 0."""
    parser = subparsers.add_parser(name, help=text)
    parser.set_defaults(command=command)
    return parser


def add_config_arguments(
    parser: argparse.ArgumentParser, dry_run: str = "print all derived values and start nothing"
) -> None:
    """Add a configuration file, overrides and --dry-run."""
    parser.add_argument("config", type=Path, help="TOML file, such as configs/demo.toml")
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")


def add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--site", type=Path, metavar="FILE", help="the cluster's settings; by default the file that FARSPAN_SITE names"
    )


def check_count(count: int, flag: str) -> None:
    """Raise ConfigError for less than one."""
    if count < 1:
        raise ConfigError(f"{flag} {count} must be at least 1.")


def config_of(options: argparse.Namespace) -> Config:
    """Load the configuration file with its overrides."""
    from farspan.trainer.config import Config
    from farspan.trainer.toml_config import load_config

    return load_config(Config, options.config, options.overrides)


def print_dry_run(options: argparse.Namespace, num_ranks: int, *, flag: str) -> None:
    """Print the values derived from a configuration for `num_ranks`, the value of `flag`."""
    check_count(num_ranks, flag)
    from farspan.trainer.resolve import dry_run

    dry_run(config_of(options), num_ranks)
