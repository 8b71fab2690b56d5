"""The jobs that a run was submitted as: one file in its folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from farspan.launch.slurm.client import SlurmError

FILE = "jobs.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """job: its id, of an array's element such as 17_3. script: what was submitted. submitted: when, in ISO form."""

    job: str
    script: str
    submitted: str


def add(run: Path, submission: Submission) -> None:
    with (run / FILE).open("a") as file:
        file.write(json.dumps(asdict(submission)) + "\n")


def submissions(run: Path) -> list[Submission]:
    """Return the jobs of a run, oldest first; raises SlurmError where there have been none."""
    path = run / FILE
    if not path.is_file():
        runs = runs_of(run)
        if runs:
            raise SlurmError(f"{run} holds {len(runs)} runs: name one of them, such as {runs[0]}.")
        raise SlurmError(f"{run} has no {FILE}: name the folder of a run that was submitted to SLURM.")
    return [Submission(**json.loads(line)) for line in path.read_text().splitlines()]


def runs_of(folder: Path) -> list[Path]:
    """Return the runs of a job array, one for each element."""
    return sorted(path.parent for path in folder.glob(f"*/{FILE}") if path.parent.name.isdigit())


def last_submitted(run: Path) -> str:
    """Return when the run was last submitted; of one submitted by hand alone, a time before all others."""
    return submissions(run)[-1].submitted if (run / FILE).is_file() else ""
