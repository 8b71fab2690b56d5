"""From a job to SLURM's queue: the run's folder gets the code, the configuration and the script; then sbatch."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import farspan
from farspan.kernels.errors import FarspanError
from farspan.launch.env import outside_of_jobs
from farspan.launch.slurm import SlurmJob

JOBS_FILE = "jobs.jsonl"
SUBMITTED = "submitted"


class SlurmError(FarspanError):
    """SLURM is not there, or has refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One job in a run's `jobs.jsonl`. script: what was submitted. submitted: when."""

    job: str
    script: str
    submitted: str


def next_submission(run: Path) -> Path:
    """Return the folder of the next submission of a run; it is not made yet."""
    numbers = [int(path.name) for path in (run / SUBMITTED).glob("*") if path.name.isdigit()]
    return run / SUBMITTED / f"{max(numbers, default=0) + 1:03}"


def check_ready(run: Path) -> None:
    """Raise FarspanError when the run's folder cannot be written or there is no sbatch."""
    nearest = next(path for path in (run, *run.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise SlurmError(f"run.folder={str(run)!r} cannot be written at {nearest}: choose another.")
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "sbatch was not found: submit from a machine of the cluster, or see the script with --dry-run."
        )


def submit(job: SlurmJob, config: str, chain: int) -> list[str]:
    """Write what the job needs, its configuration as TOML, and submit it `chain` times; return the ids in turn."""
    try:
        job.submitted.mkdir(parents=True)
        (job.run / "logs").mkdir(exist_ok=True)
        (job.submitted / "config.toml").write_text(config)
        (job.submitted / "job.sh").write_text(job.script())
        copy_code(job.submitted / "code")
    except OSError as error:
        raise SlurmError(f"{error.filename or job.submitted} cannot be written ({error.strerror}).") from None
    return [_sbatch(job) for _ in range(chain)]


def copy_code(target: Path) -> None:
    """Copy the code that runs now, with the commit that it is of and the changes since, if git knows them."""
    package = Path(farspan.__file__).parent
    # Its folders are links in a checkout; the copy is one tree of real files.
    shutil.copytree(package, target / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    checkout = package.parent
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is not None and (checkout / ".git").exists():
        (target / "commit.txt").write_text(commit)
        (target / "changes.diff").write_text(_git(checkout, "diff", "HEAD") or "")


def submissions(run: Path) -> list[Submission]:
    """Return the jobs of a run, oldest first; raises SlurmError where there have been none."""
    path = run / JOBS_FILE
    if not path.is_file():
        raise SlurmError(f"{run} has no {JOBS_FILE}: name the folder of a run that was submitted to SLURM.")
    return [Submission(**json.loads(line)) for line in path.read_text().splitlines()]


def slurm(command: Sequence[str]) -> str:
    """Run one of SLURM's commands and return what it prints; raises SlurmError with its complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=outside_of_jobs(), stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} was not found: use a machine of the cluster.") from None
    if done.returncode:
        raise SlurmError(f"{command[0]} refused: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
    return done.stdout


def _sbatch(job: SlurmJob) -> str:
    # With --parsable: the id and, where there are several clusters, the name of one.
    script = job.submitted / "job.sh"
    number = slurm(["sbatch", "--parsable", str(script)]).strip().partition(";")[0]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    with (job.run / JOBS_FILE).open("a") as file:
        file.write(json.dumps({"job": number, "script": str(script), "submitted": when}) + "\n")
    return number


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
