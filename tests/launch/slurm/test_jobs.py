"""The commands on jobs, with a fake squeue; tests/slurm has a real one."""

import json
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.launch.commands.jobs import log_file
from farspan.launch.slurm.client import SlurmError
from farspan.launch.slurm.history import Submission, add_failure, add_submission
from tests.support.programs import install

SQUEUE = """[ $6 = -o ] || { echo '9                   |2                   |'; exit; }
echo '9|RUNNING|1:02|20:00|n[1-2]|n3|None'
echo '90|RUNNING|1|2|n3||x'
echo '10|PENDING|0:00|20:00|||D'"""
STEP = {"step": 7, "loss": 2.5, "tokens_per_s": 12345.6}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of jobs 8 (forgotten), 9 (running) and 10 (pending) on a fake SLURM."""
    install(tmp_path, squeue=SQUEUE, scancel=f'echo "$*" >>{tmp_path}/canceled')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    write_jobs(run, "8", "9", "10")
    return run


def write_jobs(run: Path, *jobs: str) -> None:
    lines = [json.dumps({"job": job, "script": "s", "submitted": "t"}) + "\n" for job in jobs]
    (run / "jobs.jsonl").write_text("".join(lines))


def test_status_is_a_line_for_each_job_and_the_progress(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["jobs", "status", str(run)]
    assert cli.main(command) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["job", "state", "time", "limit", "restarts", "nodes", "excluded", "reason"],
        ["8", "ENDED"],
        ["9", "RUNNING", "1:02", "20:00", "2", "n[1-2]", "n3", "None"],
        ["10", "PENDING", "0:00", "20:00", "D"],
        ["no", "step", "yet"],
    ]
    evaluation = {"step": 7, "eval_loss": 1.0}
    cut_short = '{"step": 8, "loss"'
    lines = [json.dumps(STEP | {"step": 6}), json.dumps(STEP), json.dumps(evaluation), cut_short]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "checkpoints/step_00000004").mkdir(parents=True)
    add_failure(run, "9", "a rank on n3 was killed by SIGKILL", ["n3"])
    assert cli.main(command) == 0
    failed, step = capsys.readouterr().out.splitlines()[-2:]
    assert failed.startswith("failed at 2")
    assert failed.endswith(", job 9, checkpoint step_00000004: a rank on n3 was killed by SIGKILL (n3)")
    assert step.startswith("step 7  loss 2.5000  12,346 tok/s  ")


def test_a_record_that_a_full_disk_cut_short_is_passed_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "jobs.jsonl"
    whole = path.read_text()
    for tail in ('{"job": "11', '{"job": "11"}\n', "\0\0\n", "\xff"):
        path.write_bytes((whole + tail).encode("latin-1"))
        add_submission(run, Submission(job="12", script="s"))
        assert cli.main(["jobs", "status", str(run)]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["job", "8", "9", "10", "12", "no"]
    path.write_text('{"job": "1')
    assert cli.main(["jobs", "status", str(run)]) == cli.EXIT_USER_ERROR
    assert "has no job in jobs.jsonl: name the folder of a run" in capsys.readouterr().err


def test_runs_of_an_array_are_listed_and_canceled_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = run.parent / "array"
    for name, job in (("000", "9"), ("001", "10")):
        (runs / name).mkdir(parents=True)
        write_jobs(runs / name, job)
    assert cli.main(["jobs", "status", str(runs)]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [f"{runs}/000", "job", "9", "no", f"{runs}/001", "job", "10", "no"]
    assert cli.main(["jobs", "cancel", str(runs)]) == 0
    assert capsys.readouterr().out == "canceled    10, 9\n"
    assert cli.main(["jobs", "logs", str(runs)]) == cli.EXIT_USER_ERROR


def test_active_jobs_are_canceled_the_last_one_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["jobs", "cancel", str(run)]) == 0
    assert capsys.readouterr().out == "canceled    10, 9\n"
    assert (run.parent / "canceled").read_text() == "10\n9\n"


def test_the_log_is_that_of_the_newest_job_that_has_started(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SlurmError, match="`farspan jobs status"):
        log_file(run, None)
    for name, text in (("8.log", "old"), ("9.log", "merged"), ("9/2/rank_1.log", "before"), ("9/10/rank_1.log", "now")):
        path = run / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    for options, text in (([], "merged\n"), (["--rank", "1"], "now\n")):
        assert cli.main(["jobs", "logs", str(run), *options]) == 0
        assert capfd.readouterr().out == text
    assert cli.main(["jobs", "logs", str(run), "--rank", "5"]) == cli.EXIT_USER_ERROR
    assert "job 9 has no log of rank 5; without --rank" in capfd.readouterr().err
    assert cli.main(["jobs", "logs", str(run.parent)]) == cli.EXIT_USER_ERROR
