"""The command line. Each command is a module of launch/commands, which adds its parser and the function that runs it.

Importing torch takes seconds, so each command imports the code that it needs when it runs.
"""

import argparse
import atexit
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn, TextIO

from farspan.errors import FarspanError
from farspan.launch.commands import checkpoint, jobs, launch, models, train
from farspan.launch.commands.arguments import Subparsers, add_command, add_subparsers
from farspan.trainer.resilience.signals import EXIT_USER_ERROR, KILLED, StopSignal, stop_signals_blocked

EXIT_INTERRUPTED = 130
DASHED_OVERRIDE = re.compile(r"--\w+\.[\w.]+(=|$)")

log = logging.getLogger("farspan")


def run_and_exit() -> NoReturn:
    """Run the command of this process and end it; the entry point.

    A rank ends without finalizing Python: a thread of gloo may still have the last reference to a tensor, and a thread
    that asks for the GIL while Python is finalized is ended, here inside a C++ destructor, which aborts the process.
    torch can neither join nor stop these threads.
    """
    if sys.argv[1:2] != ["train"]:
        sys.exit(main())
    status = 1
    try:
        status = main()
    except SystemExit as request:
        # argparse's: 0 after --help, 2 for an error that it has printed.
        status = int(request.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads them any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 2 for an error that the user can fix, others of `signals`."""
    words = sys.argv[1:] if arguments is None else arguments
    # A rank that cannot act on a signal yet leaves it pending. Blocked before numpy and torch start threads: threads
    # inherit the block, and one without it would take the signal.
    with stop_signals_blocked() if words[:1] == ["train"] else nullcontext():
        return _run(parse(words))


def _run(options: argparse.Namespace) -> int:
    # `launch slurm --dry-run` prints a script: nothing else may go to standard output.
    prints_script = options.command is launch.run_slurm and options.dry_run
    try:
        with _log_to(sys.stderr if prints_script else sys.stdout):
            return options.command(options) or 0
    except FarspanError as error:
        print(f"farspan: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; overrides may stand before, between and after flags, which argparse alone does not allow."""
    parser = argparse.ArgumentParser(prog="farspan", description="Train language models on long context.")
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


def _add_data(subparsers: Subparsers) -> None:
    """Add `farspan data prepare`, whose arguments are beside the code."""
    # Imports numpy, which must not start threads before `farspan train` has blocked signals: see main.
    from farspan.trainer.data import prepare

    def run(options: argparse.Namespace) -> None:
        # Their default would leave the folder that is being written.
        with StopSignal(first=_leave):
            prepare.run(options)

    commands = add_subparsers(subparsers.add_parser("data", help="make training data"), "COMMAND")
    prepare.add_arguments(add_command(commands, "prepare", run, "turn text into memory-mapped tokens"))


def _leave(number: int) -> NoReturn:
    """End with the status of a process that the signal killed, after all that has to be done before."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\nfarspan: stopped by {signal.Signals(number).name}; nothing is written.\n".encode())
    raise SystemExit(KILLED + number)


@contextmanager
def _log_to(stream: TextIO) -> Iterator[None]:
    """Print log messages, without any prefix, to `stream`."""
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    run_and_exit()
