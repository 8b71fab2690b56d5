"""The command line. Each command is a module of launch/commands, which adds its parser and the function that runs it.

Importing torch takes seconds, so each command imports the code that it needs when it runs.
"""

import argparse
import atexit
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from farspan.errors import FarspanError, file_errors_reported
from farspan.launch.commands import checkpoint, jobs, launch, models, train
from farspan.launch.commands.arguments import Parser, Subparsers, add_command, add_subparsers
from farspan.launch.output import guard_standard_streams, log_to, print_error, status_with_output
from farspan.trainer.resilience.signals import EXIT_FAILED, EXIT_USER_ERROR, INTERRUPTED, STOP_SIGNALS, stopped_at_once
from farspan.versions import summary

DASHED_OVERRIDE = re.compile(r"--\w+\.[\w.]+(=|$)")


def run_and_exit() -> NoReturn:
    """Run the command of this process and end it; the entry point.

    A rank ends without finalizing Python: a thread of gloo may still have the last reference to a tensor, and a thread
    that asks for the GIL while Python is finalized is ended, here inside a C++ destructor, which aborts the process.
    torch can neither join nor stop these threads.
    """
    guard_standard_streams()
    status, is_rank = EXIT_FAILED, sys.argv[1:2] == ["train"]
    if is_rank:
        # A rank that cannot act on a signal yet leaves it pending, and one that has ended keeps its status. Blocked
        # before numpy and torch start threads: threads inherit the block, and one without it would take the signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        status = main() if is_rank else _run(_parse_interruptibly())
    except SystemExit as request:
        # argparse's: 0 after --help, 2 for an error that it has printed.
        status = int(request.code or 0)
    except BaseException:
        traceback.print_exc()
    if not is_rank:
        sys.exit(status_with_output(status))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse_interruptibly() -> argparse.Namespace:
    """Parse this process's arguments; SIGTERM and SIGHUP, during that or later, end it as Ctrl-C does."""
    with stopped_at_once():
        options = parse(None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not ignored, as by nohup
            signal.signal(number, signal.default_int_handler)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 2 for an error that the user can fix, others of `signals`."""
    return _run(parse(arguments))


def _run(options: argparse.Namespace) -> int:
    # `launch slurm --dry-run` prints a script: nothing else may go to standard output.
    prints_script = options.command is launch.run_slurm and options.dry_run
    try:
        with log_to(sys.stderr if prints_script else sys.stdout), file_errors_reported():
            return options.command(options) or 0
    except FarspanError as error:
        print_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; overrides may stand before, between and after flags, which argparse alone does not allow."""
    parser = Parser(prog="farspan", description="Train language models on long context.")
    parser.add_argument("--version", action=_PrintVersions, nargs=0, help="print versions and the commit, and exit")
    subparsers = add_subparsers(parser, "COMMAND")
    # In the order of `farspan --help`.
    for command in (train, launch, jobs):
        command.add_parser(subparsers)
    _add_data(subparsers)
    models.add_parser(subparsers)
    checkpoint.add_parser(subparsers)
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        dashed = next((word for word in unknown if DASHED_OVERRIDE.match(word)), None)
        hint = f"; write an override without dashes: {dashed.lstrip('-').partition('=')[0]}=VALUE" if dashed else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


class _PrintVersions(argparse.Action):
    """As argparse's own action, but finds the versions only where they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(summary())
        parser.exit()


def _add_data(subparsers: Subparsers) -> None:
    """Add `farspan data prepare`, whose arguments are beside the code."""
    # Imports numpy, which must not start threads before `farspan train` has blocked signals: see run_and_exit.
    from farspan.trainer.data import prepare

    commands = add_subparsers(subparsers.add_parser("data", help="make training data"), "COMMAND")
    prepare.add_arguments(add_command(commands, "prepare", prepare.run, "turn text into memory-mapped tokens"))


if __name__ == "__main__":
    run_and_exit()
