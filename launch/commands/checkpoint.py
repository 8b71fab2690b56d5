"""`farspan checkpoint ls|verify|prune|export`."""

import argparse
import logging
import shutil
from datetime import datetime
from pathlib import Path

from farspan.errors import CheckpointError, ConfigError
from farspan.launch.commands import models
from farspan.launch.commands.arguments import Subparsers, add_command, add_subparsers
from farspan.trainer.checkpoint.steps import PREFIX, REFUSED, finished, prune, step_of
from farspan.trainer.resilience.lock import lock_folder
from farspan.units import BYTES, readable

EXIT_DAMAGED = 1

log = logging.getLogger("farspan")


def add_parser(subparsers: Subparsers) -> None:
    commands = add_subparsers(subparsers.add_parser("checkpoint", help="list, verify, delete checkpoints"), "COMMAND")
    parser = add_command(commands, "ls", _ls, "list the checkpoints of a run")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")

    parser = add_command(commands, "verify", _verify, "read every byte; exit status 1 if a checkpoint is damaged")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run, or one of its folders checkpoints/step_*")

    parser = add_command(commands, "prune", _prune, "delete old checkpoints, and those that a resumed run refused")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="keep the newest N")
    permanent = "also keep multiples of N steps; by default those that the run keeps"
    parser.add_argument("--permanent-every-steps", type=int, metavar="N", help=permanent)

    models.add_export(commands)


def _ls(options: argparse.Namespace) -> None:
    """Print a line for each checkpoint of a run; raises CheckpointError if there are none."""
    rows = [("step", "saved", "size", "files", "tokens", "")]
    rows += [_row(path) for path in [*_finished(options.run), *_refused(options.run)]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        *columns, note = row
        log.info("%s", "  ".join([*map(str.rjust, columns, widths), note]).rstrip())


def _row(path: Path) -> tuple[str, ...]:
    from farspan.trainer.checkpoint.manifest import Manifest
    from farspan.trainer.checkpoint.verify import check_sizes

    step = str(step_of(Path(path.name.removeprefix(REFUSED))))
    saved = f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}"
    try:
        manifest = Manifest.read(path)
        check_sizes(path, manifest.files)
    except CheckpointError as error:
        return step, saved, "", "", "", str(error).removeprefix(f"checkpoint {path} ")
    note = "refused" if path.name.startswith(REFUSED) else ""
    sizes = readable(manifest.total_bytes, BYTES), str(len(manifest.files)), f"{manifest.train_state['tokens']:,}"
    return step, saved, *sizes, note


def _verify(options: argparse.Namespace) -> int:
    """Read every byte of a run's checkpoints, or of one, and print the results."""
    from farspan.trainer.checkpoint.manifest import DamagedError
    from farspan.trainer.checkpoint.verify import check_complete

    folder, status = options.folder, 0
    is_step = folder.name.startswith((PREFIX, REFUSED)) and not (folder / "checkpoints").exists()
    for path in [folder] if is_step else _finished(folder):
        try:
            manifest = check_complete(path)
        except DamagedError as error:
            if path is not folder and not path.exists():
                # By the run itself, which keeps only its newest checkpoints.
                log.info("deleted     %s in the meantime", path)
                continue
            log.info("damaged     %s", error)
            status = EXIT_DAMAGED
        else:
            log.info("complete    %s, %s bytes in %d files", path, f"{manifest.total_bytes:,}", len(manifest.files))
    return status


def _prune(options: argparse.Namespace) -> None:
    """Delete old and refused checkpoints of a run that is not training, and print their paths.

    Raises ConfigError for invalid numbers or a run that is training, CheckpointError if the newest checkpoint is
    damaged.
    """
    from farspan.trainer.checkpoint.verify import check_complete
    from farspan.trainer.config import Config
    from farspan.trainer.toml_config import load_config

    run, keep, permanent_every_steps = options.run, options.keep, options.permanent_every_steps
    if keep < 1:
        raise ConfigError(f"--keep {keep} must be at least 1: the newest checkpoint is never deleted.")
    if permanent_every_steps is None:
        permanent_every_steps = load_config(Config, run / "config.toml").checkpoint.permanent_every_steps
    if permanent_every_steps < 0:
        raise ConfigError(f"--permanent-every-steps {permanent_every_steps} must be at least 0.")
    newest = _finished(run)[-1]
    # Before the lock, as it takes a while: a job that starts while the folder is locked fails.
    check_complete(newest)
    with lock_folder(run):
        if _finished(run)[-1] != newest:
            raise CheckpointError(f"{run} saved another checkpoint in the meantime: try again.")
        gone = prune(newest.parent, keep=keep, permanent_every_steps=permanent_every_steps)
        for path in _refused(run):
            shutil.rmtree(path)
            gone.append(path)
    for path in gone:
        log.info("deleted     %s", path)
    if not gone:
        log.info("deleted     nothing: every checkpoint is to be kept")


def _finished(run: Path) -> list[Path]:
    found = finished(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run} has no finished checkpoint: name the folder of a run that has saved one.")
    return found


def _refused(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob(f"{REFUSED}{PREFIX}*"))
