"""What has become of a run's jobs: their state, how far the run is, their logs, their end."""

import shutil
import subprocess
import time
from pathlib import Path

from farspan.launch.submit import SlurmError, slurm, submissions
from farspan.trainer.records import records

LOG_LINES = 100
ENDED = "ENDED"
"""What SLURM no longer remembers."""
OVER = {"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "BOOT_FAIL", ENDED}


def status(run: Path) -> str:
    """Return a table of the run's jobs and a line that says how far the run is."""
    ids = [submission.job for submission in submissions(run)]
    known = _queue(ids)
    rows = [("job", "state", "time", "limit", "nodes", "why"), *(known.get(job, (job, ENDED)) for job in ids)]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([*lines, progress(run)])


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


def cancel(run: Path) -> list[str]:
    """Cancel the run's jobs that are not over, the last first, so that none of them starts now; return their ids."""
    ids = [submission.job for submission in submissions(run)]
    known = _queue(ids)
    left = [job for job in reversed(ids) if job in known and known[job][1] not in OVER]
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


def _queue(ids: list[str]) -> dict[str, tuple[str, ...]]:
    """Return a row for each job that SLURM remembers, by its id."""
    # Of all jobs of the user: asked for one that it has forgotten, squeue fails.
    listed = slurm(["squeue", "--me", "-h", "-t", "all", "-o", "%A|%T|%M|%l|%N|%r"])
    rows = (tuple(line.split("|")) for line in listed.splitlines())
    return {row[0]: row for row in rows if row[0] in ids}
