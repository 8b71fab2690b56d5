"""The records of a run's jobs, two files in its folder: which jobs were submitted, and which failures they had.

A job reads and writes them before its environment is set up: only Python's own library is imported.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from farspan.launch.slurm.client import SlurmError, run_slurm
from farspan.trainer.checkpoint.steps import finished

JOBS_FILE = "jobs.jsonl"
FAILURES_FILE = "failures.jsonl"
END_FILE = "over"
REQUEUED = "queued again"

T = TypeVar("T")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """job: its id, for an array's element such as 17_3. script: the batch script. submitted: the time, in ISO form."""

    job: str
    script: str
    submitted: str = field(default_factory=now)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """when: in ISO form. job: its id. nodes: those to blame. checkpoint: the newest one at that time."""

    when: str = field(default_factory=now)
    job: str
    reason: str
    nodes: tuple[str, ...]
    checkpoint: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExclusionPolicy:
    """hours: how long a node is excluded after a failure. max_nodes: how many at once. always: the site's own list."""

    hours: float
    max_nodes: int
    always: str = ""


def add_submission(run: Path, submission: Submission) -> None:
    _append(run / JOBS_FILE, submission)


def read_submissions(run: Path) -> list[Submission]:
    """Return the jobs of a run, oldest first; raises SlurmError if there are none."""
    found = list(_records(run / JOBS_FILE, Submission))
    if not found:
        runs = array_runs(run)
        if runs:
            raise SlurmError(f"{run} holds {len(runs)} runs: name one of them, such as {runs[0]}.")
        raise SlurmError(f"{run} has no job in {JOBS_FILE}: name the folder of a run that was submitted to SLURM.")
    return found


def array_runs(folder: Path) -> list[Path]:
    """Return the runs of a job array, one for each element."""
    return sorted(path.parent for path in folder.glob(f"*/{JOBS_FILE}") if path.parent.name.isdigit())


def add_failure(run: Path, job: str, reason: str, nodes: Sequence[str]) -> None:
    failure = Failure(job=job, reason=reason, nodes=tuple(nodes), checkpoint=newest_checkpoint(run))
    _append(run / FAILURES_FILE, failure)


def _append(path: Path, record: Submission | Failure) -> None:
    is_cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * is_cut + json.dumps(asdict(record)) + "\n")


def _records(path: Path, make: Callable[..., T]) -> Iterator[T]:
    """Yield what `make` returns for the values of each line of a file, which need not exist."""
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        # A full disk or a dying node may have cut a line short, which must not keep a job from starting.
        with suppress(ValueError, TypeError):
            yield make(**json.loads(line))


def read_failures(run: Path) -> list[Failure]:
    """Return the failures of a run, oldest first."""
    return [replace(found, nodes=tuple(found.nodes)) for found in _records(run / FAILURES_FILE, Failure)]


def logs_of_start(run: Path, job: str, restart: int) -> Path:
    """Return the folder of a start of a job, with the logs of its ranks and how it ended."""
    return run / "logs" / job / str(restart)


def write_end(logs: Path, *, is_requeued: bool) -> None:
    """Record that a start was not ended by SLURM, and whether the job will start again."""
    (logs / END_FILE).write_text(REQUEUED if is_requeued else "")


def is_final(logs: Path) -> bool:
    """Return whether a start was the job's last: it ended by itself and the job was not queued again."""
    return has_ended(logs) and (logs / END_FILE).read_text() != REQUEUED


def has_ended(logs: Path) -> bool:
    """Return whether a start ended by itself: what SLURM ends, it also starts again, unless a user canceled it."""
    return (logs / END_FILE).exists()


def newest_checkpoint(run: Path) -> str | None:
    found = finished(run / "checkpoints")
    return found[-1].name if found else None


def consecutive_failures(run: Path) -> int:
    """Return how many failures have happened since the newest checkpoint was saved and the run was last submitted."""
    newest, count = newest_checkpoint(run), 0
    # A time before all others for a run that was submitted by hand only.
    since = max((submission.submitted for submission in _records(run / JOBS_FILE, Submission)), default="")
    for failure in reversed(read_failures(run)):
        if failure.checkpoint != newest or failure.when < since:
            break
        count += 1
    return count


def failed_nodes(runs: Sequence[Path], hours: float) -> list[str]:
    """Return the nodes to blame for failures of the last hours, the most recent first."""
    oldest = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
    recent = [failure for run in runs for failure in read_failures(run) if failure.when > oldest]
    # Of those in one second, the last one of a run's file is the most recent.
    recent.sort(key=lambda failure: failure.when)
    return list(dict.fromkeys(node for failure in reversed(recent) for node in failure.nodes))


def nodes_to_exclude(
    runs: Sequence[Path], script: Path, policy: ExclusionPolicy, report: Callable[[str], object]
) -> str | None:
    """Return the list of nodes to exclude from a job of the runs, as SLURM takes it, or None for no change.

    A node that failed is excluded only if the job can still run without it; otherwise that is reported.
    """
    failed = failed_nodes(runs, policy.hours)[: policy.max_nodes]
    for count in range(len(failed), 0, -1):
        nodes = ",".join([*([policy.always] if policy.always else []), *failed[:count]])
        try:
            # SLURM knows best: it considers partition, constraint, GPUs and nodes that are down.
            run_slurm(["sbatch", "--test-only", f"--exclude={nodes}", str(script)])
        except SlurmError as error:
            report(f"{failed[count - 1]} failed but is not excluded, as the job could not run without it: {error}")
        else:
            report(f"excluded, as the run failed there: {', '.join(failed[:count])}")
            return nodes
    return None
