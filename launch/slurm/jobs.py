"""What has become of a run's jobs: their state, how far the run is, their logs, their end."""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from farspan.launch.slurm.client import SlurmError, slurm
from farspan.launch.slurm.failures import failures
from farspan.launch.slurm.history import FILE, runs_of, submissions
from farspan.trainer.state import records

LOG_LINES = 100
FAILURES_SHOWN = 3
ENDED = "ENDED"
"""What SLURM no longer remembers."""
OVER = {"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "BOOT_FAIL", ENDED}


class Row(NamedTuple):
    """What SLURM says of a job."""

    job: str
    state: str
    time: str = ""
    limit: str = ""
    restarts: str = ""
    nodes: str = ""
    excluded: str = ""
    why: str = ""


def status(folder: Path) -> str:
    """Return a table of a run's jobs, its last failures and how far it is; of a job array's runs, one after another."""
    if not (folder / FILE).exists() and runs_of(folder):
        return "\n".join(f"{run}\n{status(run)}" for run in runs_of(folder))
    ids = [submission.job for submission in submissions(folder)]
    known = queue(ids)
    rows = [Row._fields, *(known.get(job, Row(job, ENDED)) for job in ids)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    failed = [
        f"failed at {failure.when}, job {failure.job}, checkpoint {failure.checkpoint}: {failure.reason}"
        + (f" ({', '.join(failure.nodes)})" if failure.nodes else "")
        for failure in failures(folder)[-FAILURES_SHOWN:]
    ]
    return "\n".join([*lines, *failed, progress(folder)])


def progress(run: Path) -> str:
    """Return how far the run is, by the last step on record."""
    path = run / "metrics.jsonl"
    steps = [record for record, _ in records(path) if "loss" in record] if path.is_file() else []
    if not steps:
        return "no step yet"
    last = steps[-1]
    # Of a step that was skipped it may be null.
    loss = "none" if last["loss"] is None else f"{last['loss']:.4f}"
    ago = max(time.time() - path.stat().st_mtime, 0)
    return f"step {last['step']}  loss {loss}  {last['tokens_per_s']:,.0f} tok/s  {ago:,.0f} s ago"


def cancel(folder: Path) -> list[str]:
    """Cancel the jobs of a run, or of a job array's, that are not over; return their ids.

    The last goes first, so that none of them starts now.
    """
    runs = [folder] if (folder / FILE).exists() else runs_of(folder) or [folder]
    ids = [submission.job for run in runs for submission in submissions(run)]
    known = queue(ids)
    left = [job for job in reversed(ids) if job in known and known[job].state not in OVER]
    for job in left:
        slurm(["scancel", job])
    return left


def log_file(run: Path, rank: int | None) -> Path:
    """Return the log of the run's newest job that has one, or of one of its ranks since its last restart."""
    for submission in reversed(submissions(run)):
        merged = run / "logs" / f"{submission.job}.log"
        if merged.exists():
            break
    else:
        raise SlurmError(f"no job of {run} has started yet: see `farspan jobs status {run}`.")
    if rank is None:
        return merged
    restarts = sorted(merged.with_suffix("").glob(f"*/rank_{rank}.log"), key=lambda path: int(path.parent.name))
    if not restarts:
        raise SlurmError(f"job {merged.stem} has no log of rank {rank}; without --rank there is one of all ranks.")
    return restarts[-1]


def show_log(path: Path, *, follow: bool) -> int:
    """Print the end of a log and, if asked to, what comes, until Ctrl-C."""
    if shutil.which("tail") is None:
        raise SlurmError(f"tail was not found: read {path}.")
    return subprocess.call(["tail", "-n", str(LOG_LINES), *(["-F"] if follow else []), str(path)])


def queue(ids: Sequence[str]) -> dict[str, Row]:
    """Return a row for each job that SLURM remembers, by its id."""
    # Of all jobs of the user: asked for one that it has forgotten, squeue fails. No format has all of a row.
    asked = ["squeue", "--me", "-h", "-r", "-t", "all"]
    counted = slurm([*asked, "-O", "JobArrayID:|,RestartCnt:|"]).replace(" ", "").splitlines()
    restarts = {job: count for job, count, _ in (line.split("|") for line in counted)}
    listed = slurm([*asked, "-o", "%i|%T|%M|%l|%N|%x|%r"])
    rows = (line.split("|") for line in listed.splitlines())
    return {
        job: Row(job, state, passed, limit, restarts.get(job, ""), nodes, excluded, why)
        for job, state, passed, limit, nodes, excluded, why in rows
        if job in ids
    }
