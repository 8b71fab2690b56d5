"""Submission with a fake sbatch: the files in the run's folder, the arguments of sbatch, refusals before that."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.launch.slurm.client import SlurmError
from farspan.launch.slurm.history import (
    ExclusionPolicy,
    Submission,
    add_failure,
    add_submission,
    array_runs,
    read_submissions,
)
from farspan.launch.slurm.job import SlurmJob
from farspan.launch.slurm.site import Site
from farspan.launch.slurm.submit import check_ready, next_submission, resume, submit
from tests.support.programs import install

ROOT = Path(__file__).resolve().parents[3]
EXCLUSION = ExclusionPolicy(hours=1, max_nodes=1)
# Records its arguments and environment; prints ids from 41 on, as `sbatch --parsable` does with several clusters.
SBATCH = """
folder=$(dirname "$0")
[ ! -e "$folder/refuse" ] || { echo "sbatch: error: invalid
partition" >&2; exit 1; }
[ "$1" != --test-only ] || exit 0
echo "$*" >>"$folder/calls"
env >>"$folder/environment"
echo "$((40 + $(wc -l <"$folder/calls")));cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fake sbatch and squeue, first on the path."""
    folder = install(tmp_path / "bin", sbatch=SBATCH, squeue="[ $6 != -o ] || cat $(dirname $0)/queue")
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_chain_is_one_script_submitted_several_times(
    slurm: Path, job: SlurmJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_CONF", "file")
    check_ready(job.run)
    assert next_submission(job.run) == job.submitted
    assert submit(job, ["the configuration"], 3) == ["41", "42", "43"]
    script = job.submitted / "job.sh"
    assert script.read_text() == job.script()
    assert (job.submitted / "config.toml").read_text() == "the configuration"
    assert (job.run / "logs").is_dir(), "without it SLURM fails the job and leaves no message"
    assert (slurm / "calls").read_text() == f"--parsable {script}\n" * 3
    # Inside a job, sbatch would take over the number of tasks from it.
    environment = (slurm / "environment").read_text()
    assert "SLURM_CONF=file" in environment
    assert "SLURM_NTASKS" not in environment
    assert [submission.job for submission in read_submissions(job.run)] == ["41", "42", "43"]
    again = replace(job, submitted=next_submission(job.run))
    assert again.submitted.name == "002"
    assert submit(again, [""], 1) == ["44"]
    lines = [json.loads(line) for line in (job.run / "jobs.jsonl").read_text().splitlines()]
    assert [(line["job"], Path(line["script"]).parent.name) for line in lines][2:] == [("43", "001"), ("44", "002")]


def test_the_job_runs_the_code_of_its_submission(slurm: Path, job: SlurmJob, tmp_path: Path) -> None:
    submit(job, [""], 1)
    code = job.submitted / "code"
    assert not [path for path in code.rglob("*") if path.is_symlink() or path.name == "__pycache__"]
    assert sum(path.stat().st_size for path in code.rglob("*") if path.is_file()) < 8 * 2**20
    # From the checkout, whose own code is in the current folder.
    program = "import farspan.launch.slurm.job as job, farspan.errors as e; print(job.__file__, job.BODY, e.__file__)"
    environment = {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    files = [code / "farspan" / name for name in ("launch/slurm/job.py", "launch/slurm/job.sh", "errors.py")]
    assert done.stdout.split() == [str(path) for path in files]
    assert all(path.is_file() for path in files)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if commit.returncode == 0:
        assert (code / "commit.txt").read_text() == commit.stdout
        assert (code / "changes.diff").exists()


def test_a_run_is_resumed_by_its_last_script_without_nodes_that_failed(slurm: Path, job: SlurmJob) -> None:
    submit(job, [""], 2)
    script = job.submitted / "job.sh"
    for state in ("RUNNING", "PENDING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED"):
        (slurm / "queue").write_text(f"41|FAILED|1:02|20:00|n1||None\n42|{state}|1:02|20:00|n1||None\n")
        with pytest.raises(SlurmError, match=rf"^job 42 of .*/run is {state}: .*`farspan jobs cancel "):
            resume(job.run, EXCLUSION)
    (slurm / "queue").write_text("42|FAILED|1:02|20:00|n1||None\n")
    # In the same second, perhaps: the last one counts.
    for node in ("n2", "n1"):
        add_failure(job.run, "42", "a rank was killed", [node])
    assert resume(job.run, EXCLUSION) == "43"
    last = read_submissions(job.run)[-1]
    assert (last.job, last.script) == ("43", str(script))
    assert (slurm / "calls").read_text().splitlines()[2:] == [f"--parsable --exclude=n1 {script}"]
    # The same for a new submission.
    submit(replace(job, submitted=next_submission(job.run), site=Site(max_excluded=1)), [""], 1)
    assert (slurm / "calls").read_text().splitlines()[3].startswith("--parsable --exclude=n1 /")
    script.unlink()
    (job.run / "submitted/002/job.sh").unlink()
    with pytest.raises(SlurmError, match=r"002/job.sh is gone: .*`farspan launch slurm`"):
        resume(job.run, EXCLUSION)


@pytest.mark.parametrize(
    "state",
    [
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "TIMEOUT",
    ],
)  # fmt: skip
def test_a_job_may_have_ended_in_any_way(slurm: Path, job: SlurmJob, state: str) -> None:
    """All states of SLURM in which a job is over."""
    (job.submitted).mkdir(parents=True)
    (job.submitted / "job.sh").touch()
    add_submission(job.run, Submission(job="40", script=str(job.submitted / "job.sh")))
    (slurm / "queue").write_text(f"40|{state}|1:02|20:00|n1||None\n")
    assert resume(job.run, EXCLUSION) == "41"


def test_the_runs_of_an_array_have_their_own_configurations_and_records(slurm: Path, job: SlurmJob) -> None:
    array = replace(job, elements=2)
    assert submit(array, ["first", "second"], 2) == ["41", "42"]
    assert [path.name for path in array_runs(job.run)] == ["000", "001"]
    assert [submission.job for submission in read_submissions(job.run / "001")] == ["41_1", "42_1"]
    assert [(job.submitted / f"config_00{number}.toml").read_text() for number in range(2)] == ["first", "second"]
    assert (job.run / "001/logs").is_dir()
    with pytest.raises(SlurmError, match=r"/run holds 2 runs: .*/run/000"):
        read_submissions(job.run)
    (slurm / "queue").write_text("42_0|RUNNING|1:02|20:00|n1||None\n")
    assert resume(job.run / "001", EXCLUSION) == "43_1"
    # Under the array's name it would wait for the other runs.
    call = f"--parsable --array=1 --job-name=001-of-run {job.submitted / 'job.sh'}"
    assert (slurm / "calls").read_text().splitlines()[2:] == [call]
    # Another array in this folder keeps clear of the nodes where any run of the first has failed.
    for number, node in (("000", "n3"), ("001", "n4")):
        add_failure(job.run / number, f"41_{number[-1]}", "a rank was killed", [node])
    again = replace(array, submitted=next_submission(job.run))
    submit(again, ["first", "second"], 1)
    call = f"--parsable --exclude=n4,n3 {again.submitted / 'job.sh'}"
    assert (slurm / "calls").read_text().splitlines()[3:] == [call]
    # A single run of it keeps clear of its own.
    (slurm / "queue").write_text("")
    resume(job.run / "000", ExclusionPolicy(hours=1, max_nodes=9))
    assert (slurm / "calls").read_text().splitlines()[4].startswith("--parsable --array=0 ")
    assert "--exclude=n3 " in (slurm / "calls").read_text().splitlines()[4]


def test_refusals_are_one_sentence(slurm: Path, job: SlurmJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (slurm / "refuse").touch()
    with pytest.raises(SlurmError, match=r"^sbatch refused: sbatch: error: invalid partition$"):
        submit(job, [""], 1)
    with pytest.raises(SlurmError, match=r"has no job in jobs.jsonl: "):
        read_submissions(job.run)
    (tmp_path / "file").touch()
    with pytest.raises(SlurmError, match=rf"^run.folder='{tmp_path}/file/run' .* {tmp_path}/file: "):
        check_ready(tmp_path / "file" / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match=r"^sbatch was not found: .*--dry-run"):
        check_ready(job.run)
