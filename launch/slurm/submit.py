"""Submission of jobs: the run's folder gets the code, the configuration and the batch script, then sbatch is called."""

import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import farspan
from farspan.launch.slurm import history
from farspan.launch.slurm.client import END_STATES, SlurmError, queue, run_slurm
from farspan.launch.slurm.job import SlurmJob

SUBMITTED = "submitted"

log = logging.getLogger("farspan")


def next_submission(run: Path) -> Path:
    """Return the folder for the next submission of a run; it does not exist yet."""
    numbers = [int(path.name) for path in (run / SUBMITTED).glob("*") if path.name.isdigit()]
    return run / SUBMITTED / f"{max(numbers, default=0) + 1:03}"


def check_ready(run: Path) -> None:
    """Raise SlurmError if the run's folder cannot be written or sbatch is missing."""
    nearest = next(path for path in (run, *run.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise SlurmError(f"run.folder={str(run)!r} cannot be written at {nearest}: choose another.")
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "sbatch was not found: submit from a machine of the cluster, or print the script with --dry-run."
        )


def submit(job: SlurmJob, configs: Sequence[str], chain: int) -> list[str]:
    """Write the job's files and submit it `chain` times; return the ids. configs: the TOML of each run."""
    script = write_files(job, configs)
    exclude = _exclude_option(job.runs(), script, job.site.exclusion)
    ids = []
    for _ in range(chain):
        ids.append(_sbatch(script, *exclude))
        record(job, script, ids[-1])
    return ids


def write_files(job: SlurmJob, configs: Sequence[str]) -> Path:
    """Write what the job runs, its code and its configurations, into the run's folder; return the batch script."""
    try:
        write_configs(job, configs)
        for run in job.runs():
            # Without the folder of its log, SLURM fails the job and leaves no message.
            (run / "logs").mkdir(parents=True, exist_ok=True)
        script = job.submitted / "job.sh"
        script.write_text(job.script())
        copy_code(job.submitted / "code")
    except OSError as error:
        raise SlurmError(f"{error.filename or job.submitted} cannot be written ({error.strerror}).") from None
    return script


def write_configs(job: SlurmJob, configs: Sequence[str]) -> None:
    job.submitted.mkdir(parents=True)
    for path, config in zip(job.configs(), configs, strict=True):
        path.write_text(config)


def record(job: SlurmJob, script: Path, number: str) -> None:
    """Add a job, by its number, to the records of its runs."""
    for element, run in enumerate(job.runs()):
        name = f"{number}_{element}" if job.elements else number
        history.add_submission(run, history.Submission(job=name, script=str(script)))


def resume(run: Path, exclusion: history.ExclusionPolicy) -> str:
    """Submit a run's last script again, with the code and configuration of that time; return the id.

    Raises SlurmError while a job of the run is pending or running.
    """
    past = history.read_submissions(run)
    for job, row in queue([submission.job for submission in past]).items():
        if row.state not in END_STATES:
            cancel = f"`farspan jobs cancel {shlex.quote(str(run))}`"
            raise SlurmError(f"job {job} of {run} is {row.state}: cancel it first, with {cancel}.")
    script = Path(past[-1].script)
    if not script.exists():
        raise SlurmError(f"{script} is gone: submit the run with `farspan launch slurm`.")
    element = past[-1].job.partition("_")[2]
    # Under a name of its own, as the array's name would make it wait for the other runs of the array.
    element_options = [f"--array={element}", f"--job-name={run.name}-of-{run.parent.name}"] if element else []
    number = _sbatch(script, *element_options, *_exclude_option([run], script, exclusion))
    name = f"{number}_{element}" if element else number
    history.add_submission(run, history.Submission(job=name, script=str(script)))
    return name


def excluded_nodes(runs: Sequence[Path], script: Path, exclusion: history.ExclusionPolicy) -> str | None:
    """Return the nodes that a new job of the runs must not have, None for those of its script; says so."""
    return history.nodes_to_exclude(runs, script, exclusion, lambda message: log.info("%-12s%s", "nodes", message))


def _exclude_option(runs: Sequence[Path], script: Path, exclusion: history.ExclusionPolicy) -> list[str]:
    nodes = excluded_nodes(runs, script, exclusion)
    return [] if nodes is None else [f"--exclude={nodes}"]


def copy_code(target: Path) -> None:
    """Copy the running code, with its commit and uncommitted changes if git knows them."""
    package = Path(farspan.__file__).parent
    # In a checkout its folders are links; copytree follows them, so the copy is a tree of real files.
    shutil.copytree(package, target / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    checkout = package.parent
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is not None and (checkout / ".git").exists():
        (target / "commit.txt").write_text(commit)
        (target / "changes.diff").write_text(_git(checkout, "diff", "HEAD") or "")


def _sbatch(script: Path, *options: str) -> str:
    # --parsable prints the id, followed by `;cluster` if there are several clusters.
    return run_slurm(["sbatch", "--parsable", *options, str(script)]).strip().partition(";")[0]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
