"""The batch script at the start and the end of a job, with stand-ins for SLURM; tests/slurm has a real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farspan.launch.slurm.failures import failures
from farspan.launch.slurm.history import Submission, add
from farspan.launch.slurm.job import SlurmJob
from farspan.launch.slurm.site import Site

ROOT = Path(__file__).resolve().parents[3]
# Says what it is called with, and answers with what stands in a file of its name; as srun, does that.
STAND_IN = """#!/bin/bash
here=$(dirname "$0")
name=$(basename "$0")
[ "$1 $2" != "show hostnames" ] || { echo node7; echo node8; exit; }
[ "$1 $2" != "show job" ] || { cat "$here/job.says"; exit; }
echo "$name $*" >>"$here/called"
[ "$name" != srun ] || . "$here/step"
[ "$1" != requeue ] || kill -TERM $PPID $(ps -o ppid= $PPID)
[ ! -e "$here/$name.says" ] || cat "$here/$name.says"
[ ! -e "$here/$name.refuses" ] || { echo no >&2; exit 1; }
"""
END = 'end() {{ echo "node$1 host$1 $2" >{logs}/ended/$1; }}\n'
REQUEUE, NOT_AGAIN = ["scontrol requeue 17"], []
RESUME = "go on with `farspan jobs resume {run}`"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the batch script of job 17, whose tasks do `step`."""
    for name in ("srun", "scontrol", "sbatch", "sinfo"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.says").write_text(shown("RUNNING", "None", "None"))
    run = tmp_path / "run"
    job = SlurmJob(
        run=run,
        submitted=run / "submitted/001",
        workdir=tmp_path,
        python=Path(sys.executable),
        nodes=2,
        ranks_per_node=2,
        gpus=False,
        site=Site(sbatch={"exclude": "bad[1-2]"}),
    )

    def start(step: str, restarts: int = 0, **changes: object) -> subprocess.CompletedProcess[str]:
        changed = replace(job, **changes)  # pyright: ignore[reportArgumentType]
        job.submitted.mkdir(parents=True, exist_ok=True)
        (job.submitted / "job.sh").write_text(changed.script())
        if not (job.submitted / "code").exists():
            (job.submitted / "code").symlink_to(ROOT)
        logs = changed.runs()[-1] / "logs" / ("16_1" if changed.elements else "17") / str(restarts)
        (tmp_path / "step").write_text(END.format(logs=logs) + step)
        (tmp_path / "called").unlink(missing_ok=True)
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "8",
            **({"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "1"} if changed.elements else {}),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        return subprocess.run(
            ["bash", str(job.submitted / "job.sh")], env=environment, capture_output=True, text=True, timeout=60
        )

    return start


def shown(state: str, reason: str, preempted: str) -> str:
    """As `scontrol show job` does."""
    return f"""JobId=17 JobName=x
   JobState={state} Reason={reason} Dependency=(null)
   StartTime=2026-11-28T08:42:51 EndTime=2027-11-28T08:42:51
   PreemptEligibleTime=2026-11-28T08:42:51 PreemptTime={preempted}
"""


def called(folder: Path, *names: str) -> list[str]:
    path = folder / "called"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.split()[0] in names]


@pytest.mark.parametrize(
    ("step", "status", "again", "why"),
    [
        ("end 7 0; end 8 0", 0, False, None),
        ("end 7 75; end 8 75", 75, True, None),
        ("end 7 75; end 8 0", 75, True, None),
        ("end 7 2; end 8 2; exit 2", 2, False, None),
        ("end 7 76; end 8 76; exit 76", 76, True, "ranks hung"),
        ("end 7 1; end 8 139; exit 143", 1, True, "a rank on node8 was killed by SIGSEGV"),
        # The other has lost its peer: neither its message nor its death by SLURM speaks against its node.
        ("end 7 137; end 8 2; exit 143", 1, True, "a rank on node7 was killed by SIGKILL"),
        ("end 7 134; end 8 143; exit 143", 1, True, "ranks failed with exit status 143"),
        ("exit 9", 1, True, "ranks failed with exit status 9"),
        (
            'end 7 77; end 8 77; echo "host8 no device" >"$here/run/unfit"; exit 77',
            77,
            True,
            "node8 is unfit (no device)",
        ),
    ],
)
def test_how_ranks_end_says_whether_the_job_starts_again(
    start: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    step: str,
    status: int,
    again: bool,
    why: str | None,
) -> None:
    done = start(step)
    assert (done.returncode, done.stderr) == (status, "")
    nodes = [node for node in ("node7", "node8") if why is not None and node in why]
    failed = [(failure.job, failure.reason, list(failure.nodes)) for failure in failures(tmp_path / "run")]
    assert failed == ([] if why is None else [("17", why, nodes)])
    assert ("queued again, restart 1 of 20 at most" in done.stdout) == again
    exclude = [f"scontrol update JobId=17 ExcNodeList=bad[1-2],{','.join(nodes)}"] if nodes else []
    assert called(tmp_path, "scontrol") == ([*REQUEUE, *exclude] if again else NOT_AGAIN)
    assert not (tmp_path / "run/unfit").exists()


def test_what_a_full_disk_cut_short_keeps_no_job_from_starting(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    cut = '{"when": "2026-11-28T08:42:51+00:00", "job": "1'
    (tmp_path / "run").mkdir()
    (tmp_path / "run/failures.jsonl").write_text(cut + "\n")
    done = start("end 7 1; : >$here/run/logs/17/0/ended/8; exit 1")
    assert (done.returncode, done.stderr) == (1, "")
    assert [failure.reason for failure in failures(tmp_path / "run")] == ["ranks failed with exit status 1"]
    assert called(tmp_path, "scontrol") == REQUEUE


@pytest.mark.parametrize(("restarts", "again"), [(19, True), (20, False), (21, None)])
def test_there_is_a_cap_on_restarts(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, restarts: int, again: bool | None
) -> None:
    done = start("end 7 75; end 8 75", restarts)
    assert (done.returncode, done.stderr) == (75, "")
    assert called(tmp_path, "srun") == (
        [] if again is None else [f"srun --kill-on-bad-exit=1 bash {tmp_path}/run/submitted/001/job.sh task"]
    )
    assert called(tmp_path, "scontrol") == (REQUEUE if again else NOT_AGAIN)
    resume = RESUME.format(run=tmp_path / "run")
    said = {
        True: "farspan: queued again, restart 20 of 20 at most.\n",
        False: f"farspan: not queued again, as restart 20 was the last that it may have; {resume}.\n",
        None: f"farspan: the job was started again 20 times, the most that it may be; {resume}.\n",
    }
    assert done.stdout == said[again]


def test_a_run_that_fails_without_getting_further_ends(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fail = "end 7 1; end 8 1; exit 1"
    hour = timedelta(hours=1)
    run.mkdir()
    add(run, Submission(job="17", script="s", submitted=(datetime.now(UTC) - hour).isoformat(timespec="seconds")))
    for restarts in range(2):
        assert "queued again" in start(fail, restarts).stdout
    (run / "checkpoints/step_00000008").mkdir(parents=True)
    (run / "checkpoints/step_00000009.part").mkdir()
    for restarts in range(2, 4):
        assert "queued again" in start(fail, restarts).stdout
    # A warning is no failure, and does not hide failures.
    assert start("end 7 75; end 8 75", 4).returncode == 75
    done = start(fail, 5)
    assert done.returncode == 1
    assert called(tmp_path, "scontrol") == NOT_AGAIN
    line = (
        f"farspan: 3 failures in a row with no newer checkpoint (step_00000008): the job ends; see {run}/failures.jsonl"
    )
    assert line in done.stdout
    # So does the next job of a chain, before it starts.
    assert start(fail).returncode == 1
    assert called(tmp_path, "srun") == []
    # Submitted anew, there are new tries.
    later = (datetime.now(UTC) + hour).isoformat(timespec="seconds")
    add(run, Submission(job="18", script="s", submitted=later))
    assert "queued again" in start(fail).stdout


def test_nodes_that_the_job_needs_are_not_left_out(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "sbatch.refuses").touch()
    done = start("end 7 137; end 8 137; exit 143")
    assert "node7 failed but is not left out, as the job could not run without it: sbatch refused: no" in done.stdout
    assert called(tmp_path, "scontrol") == REQUEUE
    script = tmp_path / "run/submitted/001/job.sh"
    assert called(tmp_path, "sbatch") == [
        f"sbatch --test-only --exclude=bad[1-2],{nodes} {script}" for nodes in ("node7,node8", "node7")
    ]


def test_few_nodes_are_left_out_and_not_for_ever(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = []
    for hours, node in ((30, "old"), (3, "third"), (2, "second"), (1, "second")):
        when = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
        lines.append({"when": when, "job": "1", "reason": "r", "nodes": [node], "checkpoint": "step_1"})
    (run / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start("end 7 75; end 8 75")
    assert called(tmp_path, "scontrol")[1:] == ["scontrol update JobId=17 ExcNodeList=bad[1-2],second,third"]
    start("end 7 139; end 8 1; exit 1", site=Site(max_excluded=2))
    assert called(tmp_path, "scontrol")[1:] == ["scontrol update JobId=17 ExcNodeList=node7,second"]
    start("end 7 75; end 8 75", site=Site(exclude_hours=0))
    assert called(tmp_path, "scontrol") == REQUEUE


@pytest.mark.parametrize(
    ("told", "state", "statuses", "status", "again", "why"),
    [
        # Cancelled, or queued again by SLURM; or SLURM gives no answer.
        (True, ("COMPLETING", "None", "None"), (0, 0), 0, False, None),
        (True, None, (0, 0), 0, False, None),
        (True, ("COMPLETING", "TimeLimit", "None"), (0, 75), 75, True, None),
        (True, ("COMPLETING", "TimeLimit", "None"), (0, 143), 1, True, "the time was over before the ranks had saved"),
        # Others go first: SLURM asks the ranks alone to end.
        (False, ("RUNNING", "None", "2026-11-28T08:42:55"), (0, 0), 75, True, None),
        (True, ("RUNNING", "None", "2026-11-28T08:42:55"), (137, 143), 75, True, None),
        # That was before the job's last start.
        (False, ("RUNNING", "None", "2026-11-28T08:42:50"), (0, 0), 0, False, None),
        (False, None, (0, 0), 0, False, None),
    ],
)
def test_a_job_that_slurm_ends_starts_again_unless_cancelled(
    start: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    told: bool,
    state: tuple[str, str, str] | None,
    statuses: tuple[int, int],
    status: int,
    again: bool,
    why: str | None,
) -> None:
    (tmp_path / "job.says").unlink()
    if state is not None:
        (tmp_path / "job.says").write_text(shown(*state))
    done = start(f"{'kill -TERM $PPID; ' if told else ''}end 7 {statuses[0]}; end 8 {statuses[1]}")
    assert (done.returncode, done.stderr) == (status, "")
    assert called(tmp_path, "scontrol") == (REQUEUE if again else NOT_AGAIN)
    assert [(failure.reason, failure.nodes) for failure in failures(tmp_path / "run")] == ([(why, ())] if why else [])


def test_nodes_that_slurm_lost_are_remembered(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "sinfo.says").write_text("node8\nnode8\n")
    (tmp_path / "job.says").write_text(shown("COMPLETING", "NodeDown", "None"))
    start("kill -TERM $PPID; exit 143")
    assert failures(tmp_path / "run") == []
    done = start("end 7 0; end 8 0", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(failure.reason, failure.nodes) for failure in failures(tmp_path / "run")] == [
        ("lost by SLURM", ("node8",))
    ]
    assert "--nodes=node7,node8 --states=down," in called(tmp_path, "sinfo")[0]
    # The second start has told its end itself: what is down now was not lost under it.
    assert start("end 7 0; end 8 0", 2).returncode == 0
    assert called(tmp_path, "sinfo") == []


def test_an_element_of_an_array_is_a_run_of_its_own(
    start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = start("end 7 137; end 8 1; exit 1", elements=2)
    assert (done.returncode, done.stderr) == (1, "")
    assert called(tmp_path, "scontrol") == [
        "scontrol requeue 16_1",
        "scontrol update JobId=16_1 ExcNodeList=bad[1-2],node7",
    ]
    assert [failure.job for failure in failures(tmp_path / "run/001")] == ["16_1"]
    assert not (tmp_path / "run/failures.jsonl").exists()


def test_the_end_of_a_job_needs_nothing_installed() -> None:
    program = "import sys, farspan.launch.slurm.requeue; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
