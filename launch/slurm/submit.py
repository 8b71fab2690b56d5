"""From a job to SLURM's queue: the run's folder gets the code, the configuration and the script; then sbatch."""

import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import farspan
from farspan.launch.slurm.client import SlurmError, slurm
from farspan.launch.slurm.failures import Exclusion, exclude, now
from farspan.launch.slurm.history import Submission, add, submissions
from farspan.launch.slurm.job import SlurmJob
from farspan.launch.slurm.jobs import OVER, queue

SUBMITTED = "submitted"

log = logging.getLogger("farspan")


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


def submit(job: SlurmJob, configs: Sequence[str], chain: int) -> list[str]:
    """Write what the job needs, the TOML of each run, and submit it `chain` times; return the ids in turn."""
    try:
        job.submitted.mkdir(parents=True)
        for run in job.runs():
            (run / "logs").mkdir(parents=True, exist_ok=True)
        for path, config in zip(job.configs(), configs, strict=True):
            path.write_text(config)
        script = job.submitted / "job.sh"
        script.write_text(job.script())
        copy_code(job.submitted / "code")
    except OSError as error:
        raise SlurmError(f"{error.filename or job.submitted} cannot be written ({error.strerror}).") from None
    without = _without_failed_nodes(job.runs(), script, job.site.exclusion)
    ids = []
    for _ in range(chain):
        number = _sbatch(script, *without)
        ids.append(number)
        for element, run in enumerate(job.runs()):
            name = f"{number}_{element}" if job.elements else number
            add(run, Submission(job=name, script=str(script), submitted=now()))
    return ids


def resume(run: Path, exclusion: Exclusion) -> str:
    """Submit a run's last script anew, with the code and configuration of then; return the id.

    Raises SlurmError while a job of the run is waiting or running.
    """
    past = submissions(run)
    for job, row in queue([submission.job for submission in past]).items():
        if row.state not in OVER:
            raise SlurmError(f"job {job} of {run} is {row.state}: cancel it first, with `farspan jobs cancel {run}`.")
    script = Path(past[-1].script)
    if not script.exists():
        raise SlurmError(f"{script} is gone: submit the run with `farspan launch slurm`.")
    element = past[-1].job.partition("_")[2]
    # By its own name, an element does not wait for the other runs of its array.
    alone = [f"--array={element}", f"--job-name={run.name}-of-{run.parent.name}"] if element else []
    number = _sbatch(script, *alone, *_without_failed_nodes([run], script, exclusion))
    name = f"{number}_{element}" if element else number
    add(run, Submission(job=name, script=str(script), submitted=now()))
    return name


def _without_failed_nodes(runs: Sequence[Path], script: Path, exclusion: Exclusion) -> list[str]:
    nodes = exclude(runs, script, exclusion, lambda what: log.info("%-12s%s", "nodes", what))
    return [] if nodes is None else [f"--exclude={nodes}"]


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


def _sbatch(script: Path, *options: str) -> str:
    # With --parsable: the id and, where there are several clusters, the name of one.
    return slurm(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
