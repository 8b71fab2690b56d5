"""`farspan data prepare`; its arguments are beside the code, in trainer/data/prepare.py."""

from farspan.launch.commands.arguments import Subparsers, add_subparsers


def add_parser(subparsers: Subparsers) -> None:
    # Imports numpy, which must not start threads before `farspan train` has blocked signals: see cli.main.
    from farspan.trainer.data import prepare

    commands = add_subparsers(subparsers.add_parser("data", help="make training data"), "COMMAND")
    parser = commands.add_parser("prepare", help="turn text into memory-mapped tokens")
    prepare.add_arguments(parser)
    parser.set_defaults(command=prepare.run)
