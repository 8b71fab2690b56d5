"""Submission with a stand-in for sbatch: what lies in the run's folder, what sbatch is told, what is refused before."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.launch.slurm import SlurmJob
from farspan.launch.submit import SlurmError, check_ready, next_submission, submissions, submit

ROOT = Path(__file__).resolve().parents[2]
# Notes its arguments and environment; gives out ids from 41 on, as `sbatch --parsable` does with several clusters.
SBATCH = """#!/bin/bash
here=$(dirname "$0")
[ ! -e "$here/refuse" ] || { echo "sbatch: error: invalid
partition" >&2; exit 1; }
echo "$*" >>"$here/called"
env >>"$here/environment"
echo "$((40 + $(wc -l <"$here/called")));cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a stand-in for sbatch, first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def job(tmp_path: Path) -> SlurmJob:
    run = tmp_path / "run"
    return SlurmJob(
        run=run,
        submitted=next_submission(run),
        workdir=tmp_path,
        python=Path(sys.executable),
        nodes=2,
        ranks_per_node=2,
        gpus=False,
    )


def test_a_chain_is_one_script_submitted_several_times(
    slurm: Path, job: SlurmJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_CONF", "kept")
    check_ready(job.run)
    assert submit(job, "the configuration", 3) == ["41", "42", "43"]
    assert job.submitted == job.run / "submitted/001"
    script = job.submitted / "job.sh"
    assert script.read_text() == job.script()
    assert (job.submitted / "config.toml").read_text() == "the configuration"
    assert (job.run / "logs").is_dir(), "without it SLURM fails the job and leaves no word"
    assert (slurm / "called").read_text() == f"--parsable {script}\n" * 3
    # Of the job that one submits from, SLURM would take over the number of tasks.
    given = (slurm / "environment").read_text()
    assert "SLURM_CONF=kept" in given
    assert "SLURM_NTASKS" not in given
    assert [submission.job for submission in submissions(job.run)] == ["41", "42", "43"]
    again = replace(job, submitted=next_submission(job.run))
    assert again.submitted.name == "002"
    assert submit(again, "", 1) == ["44"]
    lines = [json.loads(line) for line in (job.run / "jobs.jsonl").read_text().splitlines()]
    assert [(line["job"], Path(line["script"]).parent.name) for line in lines][2:] == [("43", "001"), ("44", "002")]


def test_the_job_runs_the_code_of_its_submission(slurm: Path, job: SlurmJob, tmp_path: Path) -> None:
    submit(job, "", 1)
    code = job.submitted / "code"
    assert not [path for path in code.rglob("*") if path.is_symlink() or path.name == "__pycache__"]
    assert sum(path.stat().st_size for path in code.rglob("*") if path.is_file()) < 8 * 2**20
    # From the checkout, whose own code lies in the current folder.
    program = "import farspan.launch.slurm as m, farspan.trainer.faults as f; print(m.__file__, f.__file__)"
    environment = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{code}/farspan/launch/slurm.py {code}/farspan/trainer/faults.py\n"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if commit.returncode == 0:
        assert (code / "commit.txt").read_text() == commit.stdout
        assert (code / "changes.diff").exists()


def test_refusals_are_one_sentence(slurm: Path, job: SlurmJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (slurm / "refuse").touch()
    with pytest.raises(SlurmError, match=r"^sbatch refused: sbatch: error: invalid partition$"):
        submit(job, "", 1)
    with pytest.raises(SlurmError, match=r"has no jobs.jsonl: name the folder of a run that was submitted to SLURM.$"):
        submissions(job.run)
    (tmp_path / "file").touch()
    with pytest.raises(SlurmError, match=rf"^run.folder='{tmp_path}/file/run' cannot be written at {tmp_path}/file: "):
        check_ready(tmp_path / "file" / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match=r"^sbatch was not found: submit from a machine of the cluster, or see "):
        check_ready(job.run)
