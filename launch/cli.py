"""The command line: train, launch, jobs, data prepare, upcycle, pool-heads, import, export, checkpoint.

Importing torch takes seconds, so that each command imports what it needs when it runs.
"""

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from farspan.errors import ConfigError, FarspanError
from farspan.launch.commands import checkpoint as checkpoint_commands
from farspan.launch.commands.arguments import add_config_arguments, check_count
from farspan.launch.commands.launch import add_jobs, add_slurm, launch_slurm
from farspan.launch.env import read_ranks
from farspan.launch.local import LocalJob
from farspan.trainer.resilience.signals import (
    EXIT_UNFIT,
    EXIT_USER_ERROR,
    EXIT_WARNED,
    StopSignal,
    announce,
    stop_signals_blocked,
)

EXIT_INTERRUPTED = 130

DASHED_OVERRIDE = re.compile(r"--\w+\.[\w.]+(=|$)")

log = logging.getLogger("farspan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 2 for an error that the user can mend, others of `faults`."""
    words = sys.argv[1:] if arguments is None else arguments
    # A rank that cannot act on a signal yet keeps it: from before numpy and torch start threads, which would let it by.
    with stop_signals_blocked() if words[:1] == ["train"] else nullcontext():
        return _run(parse(words))


def _run(options: argparse.Namespace) -> int:
    try:
        # A script on standard output has to be one.
        prints_script = options.command is launch_slurm and options.dry_run
        with _messages_on(sys.stderr if prints_script else sys.stdout):
            return options.command(options) or 0
    except FarspanError as error:
        print(f"farspan: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; overrides may stand before, between and after flags, which argparse alone cannot do."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        dashed = next((word for word in unknown if DASHED_OVERRIDE.match(word)), None)
        hint = f"; a value is changed without dashes: {dashed.lstrip('-').partition('=')[0]}=VALUE" if dashed else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    from farspan.trainer.data import prepare

    parser = argparse.ArgumentParser(prog="farspan", description="Train language models on long context.")
    commands = _add_commands(parser, "COMMAND")

    one = commands.add_parser("train", help="train in this process, or as one rank under torchrun")
    add_config_arguments(one)
    one.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: how many ranks to pretend")
    one.set_defaults(command=_train)

    launch = _add_commands(commands.add_parser("launch", help="start the ranks of a run"), "WHERE")
    local = launch.add_parser("local", help="on this machine")
    add_config_arguments(local)
    local.add_argument(
        "--gpus-per-node", type=int, required=True, metavar="N", help="ranks to start; CPU processes without GPUs"
    )
    local.set_defaults(command=_launch_local)

    add_slurm(launch)
    add_jobs(_add_commands(commands.add_parser("jobs", help="what has become of a run's SLURM jobs"), "WHAT"))

    data = _add_commands(commands.add_parser("data", help="make training data"), "WHAT")
    prepared = data.add_parser("prepare", help="turn text into memory-mapped tokens")
    prepare.add_arguments(prepared)
    prepared.set_defaults(command=prepare.run)

    upcycled = commands.add_parser("upcycle", help="make experts of trained models, for a run to begin with")
    upcycled.add_argument("config", type=Path, help="TOML file of the model with experts")
    upcycled.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    upcycled.add_argument(
        "--of", type=Path, nargs="+", required=True, metavar="RUN", help="folders of runs without experts, one or more"
    )
    upcycled.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for run.start_from")
    upcycled.set_defaults(command=_upcycle)

    pooled = commands.add_parser("pool-heads", help="make MHA or GQA of fewer KV heads, for a run to begin with")
    pooled.add_argument("source", type=Path, metavar="MODEL", help="a run, one of its checkpoints, or imported weights")
    pooled.add_argument("--kv-heads", type=int, required=True, metavar="N", help="how many; 1 is multi-query attention")
    pooled.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for run.start_from")
    pooled.set_defaults(command=_pool_heads)

    imported = commands.add_parser("import", help="take a Hugging Face model, for a run to begin with")
    imported.add_argument("source", type=Path, metavar="FOLDER", help="config.json and safetensors")
    imported.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for run.start_from")
    imported.set_defaults(command=_import)

    _add_export(commands)
    _add_checkpoint(commands.add_parser("checkpoint", help="what a run has saved"))
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    commands = _add_commands(parser, "WHAT")
    checkpoint_commands.add_arguments(commands)
    _add_export(commands)


def _add_export(commands: "argparse._SubParsersAction") -> None:
    exported = commands.add_parser("export", help="write a trained model for Hugging Face's transformers")
    exported.add_argument("source", type=Path, metavar="MODEL", help="a run, one of its checkpoints, or weights")
    exported.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="config.json and safetensors")
    exported.add_argument("--dtype", choices=("bfloat16", "float32"), help="of tensors; as they are, if left out")
    exported.set_defaults(command=_export)


def _add_commands(parser: argparse.ArgumentParser, metavar: str) -> "argparse._SubParsersAction":
    """Return what takes the commands below `parser`, which lists them where none is given."""

    def list_commands(options: argparse.Namespace) -> int:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR

    parser.set_defaults(command=list_commands)
    return parser.add_subparsers(metavar=metavar)


def _train(options: argparse.Namespace) -> int:
    if options.ranks is not None and not options.dry_run:
        raise ConfigError(
            f"--ranks {options.ranks} goes with --dry-run; torchrun or 'farspan launch' starts real ranks."
        )
    if options.dry_run:
        _dry_run(options, 1 if options.ranks is None else options.ranks, flag="--ranks")
        return 0
    ranks = read_ranks()
    log.setLevel(logging.INFO if ranks.rank == 0 else logging.WARNING)
    # One rank speaks for all; under 'launch local' the launcher has spoken already.
    announces = ranks.world_size == 1
    with StopSignal(first=announce if announces else lambda number: None) as stop:
        from farspan.trainer.config import Config
        from farspan.trainer.resilience.preflight import BadNodeError
        from farspan.trainer.toml_config import load_config
        from farspan.trainer.train import train

        try:
            warned = train(load_config(Config, options.config, options.overrides), ranks, stop)
        except FarspanError as error:
            # All ranks raise the same: see `train`.
            if ranks.rank == 0:
                print(f"farspan: {error}", file=sys.stderr)
            return EXIT_UNFIT if isinstance(error, BadNodeError) else EXIT_USER_ERROR
    return EXIT_WARNED if warned else 0


def _upcycle(options: argparse.Namespace) -> int:
    from farspan.trainer.config import Config
    from farspan.trainer.toml_config import load_config
    from farspan.trainer.weights.upcycle import upcycle

    upcycle(load_config(Config, options.config, options.overrides), options.of, options.out)
    _say_written("upcycled", options.out)
    return 0


def _pool_heads(options: argparse.Namespace) -> int:
    from farspan.trainer.weights.pool_heads import pool_heads

    pool_heads(options.source, options.kv_heads, options.out)
    _say_written("pooled", options.out)
    log.info("%-12smodel.kv_heads=%d; see %s", "with", options.kv_heads, options.out / "model.toml")
    return 0


def _import(options: argparse.Namespace) -> int:
    from farspan.trainer.hugging_face.import_model import import_model

    decoder = import_model(options.source, options.out)
    _say_written("imported", options.out)
    log.info("%-12sin place of the run's own [model]; see %s\n\n%s", "with", options.out / "model.toml", decoder.text())
    return 0


def _say_written(how: str, weights: Path) -> None:
    log.info("%-12s%s: begin a run with it by run.start_from=%s", how, weights, weights)


def _export(options: argparse.Namespace) -> int:
    import torch

    from farspan.trainer.hugging_face.export_model import export_model

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    architecture = export_model(options.source, options.out, dtype=dtype)
    log.info("%-12s%s, a %s; its tokenizer's files are yours to add", "exported", options.out, architecture.name)
    return 0


def _launch_local(options: argparse.Namespace) -> int:
    num_ranks = options.gpus_per_node
    job = LocalJob(config=options.config, overrides=tuple(options.overrides), num_ranks=num_ranks)
    if options.dry_run:
        _dry_run(options, num_ranks, flag="--gpus-per-node")
        log.info("%-12s%s", "by torchrun", job.command_line())
        return 0
    check_count(num_ranks, "--gpus-per-node")
    from farspan.parallel.ranks import Ranks
    from farspan.trainer.config import Config
    from farspan.trainer.resolve import resolve
    from farspan.trainer.toml_config import load_config

    # Here rather than in every rank, so that what is wrong is said once and at once; the last rank needs most GPUs.
    config = load_config(Config, options.config, options.overrides)
    resolve(config, Ranks(world_size=num_ranks, local_rank=num_ranks - 1))
    return job.run()


def _dry_run(options: argparse.Namespace, num_ranks: int, *, flag: str) -> None:
    check_count(num_ranks, flag)
    from farspan.trainer.config import Config
    from farspan.trainer.estimate.dry_run import dry_run
    from farspan.trainer.toml_config import load_config

    dry_run(load_config(Config, options.config, options.overrides), num_ranks)


@contextmanager
def _messages_on(stream: TextIO) -> Iterator[None]:
    """Print what the code logs, as it is, for the time of the block."""
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
