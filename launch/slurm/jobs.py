"""The commands on a run's jobs: status, cancel, logs."""

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from farspan.launch.slurm.client import SlurmError, run_slurm
from farspan.launch.slurm.history import JOBS_FILE, array_runs, read_failures, read_submissions
from farspan.trainer.state import records

LOG_LINES = 100
FAILURES_SHOWN = 3
ENDED = "ENDED"
"""The state of a job that SLURM no longer remembers."""
END_STATES = {
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
    "BOOT_FAIL",
    ENDED,
}


class Row(NamedTuple):
    """A line of the table of jobs."""

    job: str
    state: str
    time: str = ""
    limit: str = ""
    restarts: str = ""
    nodes: str = ""
    excluded: str = ""
    reason: str = ""


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
    path = run / "metrics.jsonl"
    steps = [record for record, _ in records(path) if "loss" in record] if path.is_file() else []
    if not steps:
        return "no step yet"
    last = steps[-1]
    # A skipped step may have none.
    loss = "none" if last["loss"] is None else f"{last['loss']:.4f}"
    ago = max(time.time() - path.stat().st_mtime, 0)
    return f"step {last['step']}  loss {loss}  {last['tokens_per_s']:,.0f} tok/s  {ago:,.0f} s ago"


def cancel(folder: Path) -> list[str]:
    """Cancel the jobs of a run, or of a job array's runs, that have not ended; return their ids."""
    runs = [folder] if (folder / JOBS_FILE).exists() else array_runs(folder) or [folder]
    ids = [submission.job for run in runs for submission in read_submissions(run)]
    known = queue(ids)
    # The last one first: otherwise the next job of a chain would start when the one before it ends.
    active = [job for job in reversed(ids) if job in known and known[job].state not in END_STATES]
    for job in active:
        run_slurm(["scancel", job])
    return active


def log_file(run: Path, rank: int | None) -> Path:
    """Return the log of the run's newest job that has one; with `rank`, that of the rank since the last restart."""
    for submission in reversed(read_submissions(run)):
        merged = run / "logs" / f"{submission.job}.log"
        if merged.exists():
            break
    else:
        raise SlurmError(f"no job of {run} has started yet: see `farspan jobs status {run}`.")
    if rank is None:
        return merged
    restarts = sorted(merged.with_suffix("").glob(f"*/rank_{rank}.log"), key=lambda path: int(path.parent.name))
    if not restarts:
        raise SlurmError(f"job {merged.stem} has no log of rank {rank}; without --rank, see the log of all ranks.")
    return restarts[-1]


def show_log(path: Path, *, follow: bool) -> int:
    """Print the end of a log and, with `follow`, new lines until Ctrl-C; return the exit status."""
    if shutil.which("tail") is None:
        raise SlurmError(f"tail was not found: read {path}.")
    return subprocess.call(["tail", "-n", str(LOG_LINES), *(["-F"] if follow else []), str(path)])


def queue(ids: Sequence[str]) -> dict[str, Row]:
    """Return a row for each job that SLURM remembers, by its id."""
    # squeue fails if asked for a job that it has forgotten, hence all of the user's jobs. Two calls, as neither of its
    # formats has all columns.
    squeue = ["squeue", "--me", "-h", "-r", "-t", "all"]
    counted = run_slurm([*squeue, "-O", "JobArrayID:|,RestartCnt:|"]).replace(" ", "").splitlines()
    restarts = {job: count for job, count, _ in (line.split("|") for line in counted)}
    listed = run_slurm([*squeue, "-o", "%i|%T|%M|%l|%N|%x|%r"])
    rows = (line.split("|") for line in listed.splitlines())
    return {
        job: Row(job, state, passed, limit, restarts.get(job, ""), nodes, excluded, reason)
        for job, state, passed, limit, nodes, excluded, reason in rows
        if job in ids
    }
