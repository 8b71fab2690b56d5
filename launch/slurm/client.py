"""SLURM's commands, and the jobs that it knows."""

import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from farspan.errors import FarspanError
from farspan.launch.env import environment_outside_jobs

ENDED = "ENDED"
"""The state of a job that SLURM no longer remembers."""
END_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
    ENDED,
}  # fmt: skip


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


class SlurmError(FarspanError):
    """SLURM is not available, or refused a command."""


def run_slurm(command: Sequence[str]) -> str:
    """Run one of SLURM's commands and return its output; raises SlurmError with its complaint."""
    environment = environment_outside_jobs()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} was not found: use a machine of the cluster.") from None
    if done.returncode:
        raise SlurmError(f"{command[0]} refused: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


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
