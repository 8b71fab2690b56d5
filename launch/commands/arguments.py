"""Arguments that several commands have."""

import argparse
from pathlib import Path

from farspan.errors import ConfigError


def add_config_arguments(
    parser: argparse.ArgumentParser, dry_run: str = "print everything derived and start nothing"
) -> None:
    """Add a configuration file, overrides and --dry-run."""
    parser.add_argument("config", type=Path, help="TOML file, such as configs/demo.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)


def add_site(parser: argparse.ArgumentParser) -> None:
    """Add --site."""
    parser.add_argument(
        "--site", type=Path, metavar="FILE", help="the cluster's settings, else the file that FARSPAN_SITE names"
    )


def check_count(count: int, flag: str) -> None:
    """Raise ConfigError for less than one."""
    if count < 1:
        raise ConfigError(f"{flag} {count} must be at least 1.")
