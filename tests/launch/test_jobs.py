"""What has become of jobs, with a stand-in for squeue; tests/slurm asks a real one."""

import json
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.launch.jobs import log_file
from farspan.launch.submit import SlurmError

STEP = {"step": 7, "loss": 2.5, "tokens_per_s": 12345.6}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of jobs 8 (forgotten), 9 (running) and 10 (waiting), with a stand-in for SLURM."""
    for name, text in (
        (
            "squeue",
            "echo '9|RUNNING|1:02|20:00|n[1-2]|None'\necho '90|RUNNING|1|2|n3|x'\necho '10|PENDING|0:00|20:00||D'",
        ),
        ("scancel", f'echo "$*" >>{tmp_path}/cancelled'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    lines = [json.dumps({"job": job, "script": "s", "submitted": "t"}) for job in ("8", "9", "10")]
    (run / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_status_is_a_line_a_job_and_how_far_the_run_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["jobs", "status", str(run)]
    assert cli.main(command) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["job", "state", "time", "limit", "nodes", "why"],
        ["8", "ENDED"],
        ["9", "RUNNING", "1:02", "20:00", "n[1-2]", "None"],
        ["10", "PENDING", "0:00", "20:00", "D"],
        ["no", "step", "yet"],
    ]
    evaluation = {"step": 7, "eval_loss": 1.0}
    cut_short = '{"step": 8, "loss"'
    lines = [json.dumps(STEP | {"step": 6}), json.dumps(STEP), json.dumps(evaluation), cut_short]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert cli.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 7  loss 2.5000  12,346 tok/s  ")


def test_cancel_ends_what_is_left_the_last_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["jobs", "cancel", str(run)]) == 0
    assert capsys.readouterr().out == "cancelled   10, 9\n"
    assert (run.parent / "cancelled").read_text() == "10\n9\n"


def test_the_log_is_that_of_the_newest_job_that_has_started(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SlurmError, match="has started yet: see `farspan jobs status"):
        log_file(run, None)
    for name, text in (("8.log", "old"), ("9.log", "merged"), ("9/2/rank_1.log", "before"), ("9/10/rank_1.log", "now")):
        path = run / "logs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    for options, text in (([], "merged\n"), (["--rank", "1"], "now\n")):
        assert cli.main(["jobs", "logs", str(run), *options]) == 0
        assert capfd.readouterr().out == text
    assert cli.main(["jobs", "logs", str(run), "--rank", "5"]) == cli.EXIT_USER_ERROR
    assert "farspan: job 9 has no log of rank 5; without --rank " in capfd.readouterr().err
    assert cli.main(["jobs", "logs", str(run.parent)]) == cli.EXIT_USER_ERROR
