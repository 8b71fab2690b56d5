"""`farspan jobs status|cancel|resume|logs`: a run's SLURM jobs."""

import argparse
import logging
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

from farspan.launch.commands.arguments import Subparsers, add_command, add_site, add_subparsers
from farspan.launch.env import site_file
from farspan.launch.slurm.client import END_STATES, ENDED, Row, SlurmError, queue, run_slurm
from farspan.launch.slurm.history import JOBS_FILE, array_runs, read_failures, read_submissions

LOG_LINES = 100
FAILURES_SHOWN = 3

log = logging.getLogger("farspan")


def add_parser(subparsers: Subparsers) -> None:
    commands = add_subparsers(subparsers.add_parser("jobs", help="watch and stop the SLURM jobs of a run"), "COMMAND")
    show = add_command(commands, "status", _status, "show their states, the run's last failures and its last step")
    stop = add_command(commands, "cancel", _cancel, "cancel those that have not ended")
    again = add_command(commands, "resume", _resume, "submit the last one again, with its code and configuration")
    logs = add_command(commands, "logs", _logs, "show what they print")
    for parser in (show, stop, again, logs):
        parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    add_site(again)
    logs.add_argument("--rank", type=int, metavar="N", help="only this rank; default: all, in one log")
    logs.add_argument("--follow", action="store_true", help="keep printing new lines until Ctrl-C")


def status_command(run: Path) -> str:
    return f"`farspan jobs status {shlex.quote(str(run))}`"


def _status(options: argparse.Namespace) -> None:
    log.info("%s", status(options.run))


def status(folder: Path) -> str:
    """Return a table of a run's jobs, its last failures and its progress; for a job array, those of each run."""
    if not (folder / JOBS_FILE).exists() and array_runs(folder):
        return "\n".join(f"{run}\n{status(run)}" for run in array_runs(folder))
    ids = [submission.job for submission in read_submissions(folder)]
    known = queue(ids)
    rows = [Row._fields, *(known.get(job, Row(job, ENDED)) for job in ids)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failures = [
        f"failed at {failure.when}, job {failure.job}, checkpoint {failure.checkpoint}: {failure.reason}"
        + (f" ({', '.join(failure.nodes)})" if failure.nodes else "")
        for failure in read_failures(folder)[-FAILURES_SHOWN:]
    ]
    return "\n".join([*lines, *failures, progress(folder)])


def progress(run: Path) -> str:
    """Return the last recorded step, with its loss and speed."""
    # It imports numpy, which takes a while and must not start threads when `farspan train` begins: see run_and_exit.
    from farspan.trainer.state import last_step

    last = last_step(run)
    if last is None:
        return "no step yet"
    # A skipped step may have none.
    loss = "none" if last["loss"] is None else f"{last['loss']:.4f}"
    ago = max(time.time() - (run / "metrics.jsonl").stat().st_mtime, 0)
    return f"step {last['step']}  loss {loss}  {last['tokens_per_s']:,.0f} tok/s  {ago:,.0f} s ago"


def _cancel(options: argparse.Namespace) -> None:
    """Cancel the jobs of a run, or of a job array's runs, that have not ended."""
    folder = options.run
    runs = [folder] if (folder / JOBS_FILE).exists() else array_runs(folder) or [folder]
    ids = [submission.job for run in runs for submission in read_submissions(run)]
    known = queue(ids)
    # The last one first: otherwise the next job of a chain would start when the one before it ends.
    active = [job for job in reversed(ids) if job in known and known[job].state not in END_STATES]
    for job in active:
        run_slurm(["scancel", job])
    log.info("%-12s%s", "canceled", ", ".join(active) or "nothing: all jobs of this run have ended")


def _resume(options: argparse.Namespace) -> None:
    from farspan.launch.slurm.site import load_site
    from farspan.launch.slurm.submit import resume

    # The job's own folder is not this one, so the path of the run has to be absolute.
    job = resume(Path.cwd() / options.run, load_site(options.site or site_file()).exclusion)
    log.info("%-12s%s; see %s", "submitted", job, status_command(options.run))


def _logs(options: argparse.Namespace) -> int:
    """Print the end of a log and, with --follow, new lines until Ctrl-C."""
    path = log_file(options.run, options.rank)
    if shutil.which("tail") is None:
        raise SlurmError(f"tail was not found: read {path}.")
    status = subprocess.call(["tail", "-n", str(LOG_LINES), *(["-F"] if options.follow else []), str(path)])
    return 0 if status == -signal.SIGPIPE else status


def log_file(run: Path, rank: int | None) -> Path:
    """Return the log of the run's newest job that has one; with `rank`, that of the rank since the last restart."""
    for submission in reversed(read_submissions(run)):
        merged = run / "logs" / f"{submission.job}.log"
        if merged.exists():
            break
    else:
        raise SlurmError(f"no job of {run} has started yet: see {status_command(run)}.")
    if rank is None:
        return merged
    restarts = sorted(merged.with_suffix("").glob(f"*/rank_{rank}.log"), key=lambda path: int(path.parent.name))
    if not restarts:
        raise SlurmError(f"job {merged.stem} has no log of rank {rank}; without --rank, see the log of all ranks.")
    return restarts[-1]
