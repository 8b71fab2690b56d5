"""The batch script at the start and the end of a job, on a fake SLURM; tests/slurm has a real one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farspan.launch.slurm.history import (
    ExclusionPolicy,
    Submission,
    add_failure,
    add_submission,
    consecutive_failures,
    is_final,
    read_failures,
)
from farspan.launch.slurm.job import SlurmJob
from farspan.launch.slurm.requeue import EndCause, JobStart
from farspan.launch.slurm.site import Site
from tests.support.processes import DEADLINE_S
from tests.support.programs import install

ROOT = Path(__file__).resolve().parents[3]
# Records its call and prints the file of its name; srun does the step. As SLURM does, requeue sends SIGTERM to the job.
FAKE = """
folder=$(dirname "$0")
name=$(basename "$0")
[ "$1 $2" != "show hostnames" ] || { echo node7; echo node8; exit; }
[ "$1 $2" != "show job" ] || { cat "$folder/job.output"; exit; }
[ "$1 $2 $3" != "show --oneliner node" ] || { cat "$folder/nodes.output" 2>/dev/null; exit; }
echo "$name $*" >>"$folder/calls"
[ "$name" != srun ] || . "$folder/step"
[ "$1" != requeue ] || kill -TERM $PPID $(ps -o ppid= $PPID)
[ ! -e "$folder/$name.output" ] || cat "$folder/$name.output"
[ ! -e "$folder/$name.refuses" ] || { echo no >&2; exit 1; }
"""
END = 'end() {{ echo "node$1 host$1 $2" >{logs}/ended/$1; }}\n'
REQUEUE = ["scontrol requeue 17"]
State = tuple[str, str, str] | None
Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def start(job: SlurmJob, tmp_path: Path) -> Start:
    """Return a function that runs the batch script of job 17, whose tasks do `step`."""
    install(tmp_path, srun=FAKE, scontrol=FAKE, sbatch=FAKE, sinfo=FAKE)
    (tmp_path / "job.output").write_text(job_output("RUNNING", "None", "None"))
    job = replace(job, site=Site(sbatch={"exclude": "bad[1-2]"}))

    def start(step: str, restarts: int = 0, **changes: object) -> subprocess.CompletedProcess[str]:
        changed = replace(job, **changes)  # pyright: ignore[reportArgumentType]
        job.submitted.mkdir(parents=True, exist_ok=True)
        (job.submitted / "job.sh").write_text(changed.script())
        if not (job.submitted / "code").exists():
            (job.submitted / "code").symlink_to(ROOT)
        logs = changed.runs()[-1] / "logs" / ("16_1" if changed.elements else "17") / str(restarts)
        (tmp_path / "step").write_text(END.format(logs=logs) + step)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "8",
            **({"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "1"} if changed.elements else {}),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        return subprocess.run(
            ["bash", str(job.submitted / "job.sh")], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )

    return start


def test_ranks_meet_at_addresses_not_at_names(start: Start, tmp_path: Path) -> None:
    """Names of nodes need not resolve. A name it is where SLURM does not answer."""
    step = 'echo "$MASTER_ADDR $MASTER_PORT" >$folder/meeting'
    start(step)
    assert (tmp_path / "meeting").read_text() == "node7 20017\n"
    lines = [
        f"NodeName={name} Arch=x86_64 CPUTot=2 NodeAddr={address} NodeHostName={name} Version=22.05\n"
        for name, address in (("node7", "10.0.0.7"), ("node8", "10.0.0.8"))
    ]
    (tmp_path / "nodes.output").write_text("".join(lines))
    # Another program may have the port: the next start tries another.
    for restart, port in ((0, 20017), (1, 21014), (2, 22011)):
        start(step, restart)
        assert (tmp_path / "meeting").read_text() == f"10.0.0.7 {port}\n"
    addresses = tmp_path / "run/logs/17/2/addresses"
    assert addresses.read_text() == "node7 10.0.0.7\nnode8 10.0.0.8\n"


def job_output(state: str, reason: str, preempted: str) -> str:
    """Return what `scontrol show job` prints."""
    return f"""JobId=17 JobName=x
   JobState={state} Reason={reason} Dependency=(null)
   StartTime=2026-11-28T08:42:51 EndTime=2027-11-28T08:42:51
   PreemptEligibleTime=2026-11-28T08:42:51 PreemptTime={preempted}
"""


def calls(folder: Path, *names: str) -> list[str]:
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.split()[0] in names]


@pytest.mark.parametrize(
    ("step", "status", "reason"),
    [
        ("end 7 0; end 8 0", 0, None),
        ("end 7 75; end 8 75", 75, None),
        ("end 7 75; end 8 0", 75, None),
        ("end 7 2; end 8 2; exit 2", 2, None),
        ("end 7 76; end 8 76; exit 76", 76, "ranks hung"),
        ("end 7 1; end 8 139; exit 143", 1, "a rank on node8 was killed by SIGSEGV"),
        # The other has lost its peer: neither its message nor its death by SLURM speaks against its node.
        ("end 7 137; end 8 2; exit 143", 1, "a rank on node7 was killed by SIGKILL"),
        ("end 7 134; end 8 143; exit 143", 1, "ranks failed with exit status 143"),
        ("exit 9", 1, "ranks failed with exit status 9"),
        ("end 7 77; end 8 77; echo host8 no device >$folder/run/unfit; exit 77", 77, "node8 is bad (no device)"),
    ],
)
def test_the_exits_of_ranks_decide_whether_the_job_is_requeued(
    start: Start, tmp_path: Path, step: str, status: int, reason: str | None
) -> None:
    """Unless it has ended well, or with a message to the user."""
    done, requeued = start(step), status not in (0, 2)
    assert (done.returncode, done.stderr) == (status, "")
    nodes = [node for node in ("node7", "node8") if reason is not None and node in reason]
    failures = [(failure.job, failure.reason, list(failure.nodes)) for failure in read_failures(tmp_path / "run")]
    assert failures == ([] if reason is None else [("17", reason, nodes)])
    assert ("restart 1 of at most 20" in done.stdout) == requeued
    exclude = [f"scontrol update JobId=17 ExcNodeList=bad[1-2],{','.join(nodes)}"] if nodes else []
    assert calls(tmp_path, "scontrol") == ([*REQUEUE, *exclude] if requeued else [])
    assert not (tmp_path / "run/unfit").exists()
    assert is_final(tmp_path / "run/logs/17/0") == (not requeued)


ENDS = [
    (137, 1, True), (77, 77, True), (2, 2, False), (75, 75, True), (76, 76, True), (143, 1, True), (0, 0, False),
]  # fmt: skip
"""Exit statuses of tasks, the strongest first, with the job's exit status and whether it is queued again."""


@pytest.mark.parametrize("strong", range(len(ENDS)), ids=[str(status) for status, _, _ in ENDS])
def test_of_two_ends_the_stronger_decides(tmp_path: Path, job: SlurmJob, strong: int) -> None:
    """Whichever node it is on: some ranks may have saved after a warning, say, and others have hung."""
    exclusion = ExclusionPolicy(hours=1, max_nodes=1)
    start = JobStart(
        run=tmp_path, job="17", restarts=0, script=tmp_path, requeues=1, max_failures=1, exclusion=exclusion
    )
    status, of_job, requeue = ENDS[strong]
    (start.logs(0) / "ended").mkdir(parents=True)
    for weak, _, _ in ENDS[strong:]:
        for first, second in ((status, weak), (weak, status)):
            (start.logs(0) / "ended" / "0").write_text(f"n0 h0 {first}")
            (start.logs(0) / "ended" / "1").write_text(f"n1 h1 {second}")
            for of_srun in (0, weak):
                found = start.outcome(of_srun, EndCause.RANKS_ENDED)
                assert (found.status, found.requeue) == (of_job, requeue), (first, second, of_srun)
                assert (found.failure is None) == (status in (2, 75, 0)), (first, second, of_srun)


def test_records_that_a_full_disk_cut_short_do_not_stop_a_job(start: Start, tmp_path: Path) -> None:
    cut = '{"when": "2026-11-28T08:42:51+00:00", "job": "1'
    (tmp_path / "run").mkdir()
    for name, text in (("failures", f"{cut}\n{cut}"), ("jobs", cut)):
        (tmp_path / f"run/{name}.jsonl").write_text(text)
    done = start("end 7 1; : >$folder/run/logs/17/0/ended/8; exit 1")
    assert (done.returncode, done.stderr) == (1, "")
    # What comes after half a line begins another.
    assert [failure.reason for failure in read_failures(tmp_path / "run")] == ["ranks failed with exit status 1"]
    assert calls(tmp_path, "scontrol") == REQUEUE


@pytest.mark.parametrize(
    ("restarts", "message"),
    [
        (19, "queued again, restart 20 of at most 20."),
        (20, "not queued again, as restart 20 was the last one allowed;"),
        (21, "the job was queued again 20 times, the most allowed;"),
    ],
)
def test_restarts_are_limited(start: Start, tmp_path: Path, restarts: int, message: str) -> None:
    starts, requeued = restarts <= 20, restarts < 20
    done = start("end 7 75; end 8 75", restarts)
    assert (done.returncode, done.stderr) == (75, "")
    srun = f"srun --kill-on-bad-exit=1 bash {tmp_path}/run/submitted/001/job.sh task"
    assert calls(tmp_path, "srun") == ([srun] if starts else [])
    assert calls(tmp_path, "scontrol") == (REQUEUE if requeued else [])
    assert done.stdout.startswith(f"farspan: {message}")
    assert (f"`farspan jobs resume {tmp_path}/run`" in done.stdout) != requeued
    assert is_final(tmp_path / f"run/logs/17/{restarts}") == (not requeued)


def test_a_run_that_fails_without_progress_ends(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fail = "end 7 1; end 8 1; exit 1"
    hour = timedelta(hours=1)
    run.mkdir()
    add_submission(
        run, Submission(job="17", script="s", submitted=(datetime.now(UTC) - hour).isoformat(timespec="seconds"))
    )
    for restarts in range(2):
        assert "queued again" in start(fail, restarts).stdout
    (run / "checkpoints/step_00000008").mkdir(parents=True)
    (run / "checkpoints/step_00000009.part").mkdir()
    for restarts in range(2, 4):
        assert "queued again" in start(fail, restarts).stdout
    # A save after a warning is no failure, and does not hide failures.
    assert start("end 7 75; end 8 75", 4).returncode == 75
    done = start(fail, 5)
    assert done.returncode == 1
    assert calls(tmp_path, "scontrol") == []
    assert "3 failures in a row with no newer checkpoint (step_00000008)" in done.stdout
    assert f"{run}/failures.jsonl" in done.stdout
    # The next job of a chain does not start.
    assert start(fail, 6).returncode == 1
    assert calls(tmp_path, "srun") == []
    assert is_final(run / "logs/17/6")
    # A new submission starts counting again.
    later = (datetime.now(UTC) + hour).isoformat(timespec="seconds")
    add_submission(run, Submission(job="18", script="s", submitted=later))
    assert "queued again" in start(fail).stdout


def test_a_failure_in_the_second_of_the_submission_counts(tmp_path: Path) -> None:
    add_failure(tmp_path, "17", "rank 3 was killed", [])
    (failure,) = read_failures(tmp_path)
    add_submission(tmp_path, Submission(job="17", script="s", submitted=failure.when))
    assert consecutive_failures(tmp_path) == 1


def test_nodes_that_the_job_needs_are_not_excluded(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sbatch.refuses").touch()
    done = start("end 7 137; end 8 137; exit 143")
    assert "node7 failed but is not excluded" in done.stdout
    assert "sbatch refused: no" in done.stdout
    assert calls(tmp_path, "scontrol") == REQUEUE
    script = tmp_path / "run/submitted/001/job.sh"
    assert calls(tmp_path, "sbatch") == [
        f"sbatch --test-only --exclude=bad[1-2],{nodes} {script}" for nodes in ("node7,node8", "node7")
    ]


def test_few_nodes_are_excluded_and_not_for_ever(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = []
    for hours, node in ((30, "old"), (3, "third"), (2, "second"), (1, "second")):
        when = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="seconds")
        lines.append({"when": when, "job": "1", "reason": "r", "nodes": [node], "checkpoint": "step_1"})
    (run / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start("end 7 75; end 8 75")
    assert calls(tmp_path, "scontrol")[1:] == ["scontrol update JobId=17 ExcNodeList=bad[1-2],second,third"]
    start("end 7 139; end 8 1; exit 1", site=Site(max_excluded=2))
    assert calls(tmp_path, "scontrol")[1:] == ["scontrol update JobId=17 ExcNodeList=node7,second"]
    # For no time at all, which leaves out a failure of this very second.
    start("end 7 139; end 8 1; exit 1", site=Site(exclude_hours=0))
    assert calls(tmp_path, "scontrol") == REQUEUE


@pytest.mark.parametrize(
    ("sigterm", "state", "statuses", "status", "reason"),
    [
        # Canceled, or requeued by SLURM itself; or SLURM does not answer.
        (True, ("COMPLETING", "None", "None"), (0, 0), 0, None),
        (True, None, (0, 0), 0, None),
        (True, ("COMPLETING", "TimeLimit", "None"), (0, 75), 75, None),
        (True, ("COMPLETING", "TimeLimit", "None"), (0, 143), 1, "the time limit came before the ranks had saved"),
        # Preempted: SLURM sends SIGTERM to the ranks alone.
        (False, ("RUNNING", "None", "2026-11-28T08:42:55"), (0, 0), 75, None),
        (True, ("RUNNING", "None", "2026-11-28T08:42:55"), (137, 143), 75, None),
        (False, ("RUNNING", "None", "2026-11-28T08:42:51"), (0, 0), 75, None),
        # That preemption was before the job's last start.
        (False, ("RUNNING", "None", "2026-11-28T08:42:50"), (0, 0), 0, None),
        (False, None, (0, 0), 0, None),
    ],
)
def test_a_job_that_slurm_ends_is_requeued_unless_canceled(
    start: Start,
    tmp_path: Path,
    sigterm: bool,
    state: State,
    statuses: tuple[int, int],
    status: int,
    reason: str | None,
) -> None:
    (tmp_path / "job.output").unlink()
    if state is not None:
        (tmp_path / "job.output").write_text(job_output(*state))
    done = start(f"{'kill -TERM $PPID; ' if sigterm else ''}end 7 {statuses[0]}; end 8 {statuses[1]}")
    assert (done.returncode, done.stderr) == (status, "")
    assert calls(tmp_path, "scontrol") == (REQUEUE if status else [])
    failures = [(failure.reason, failure.nodes) for failure in read_failures(tmp_path / "run")]
    assert failures == ([(reason, ())] if reason else [])
    # What SLURM ends by itself may start again.
    assert is_final(tmp_path / "run/logs/17/0") == (not sigterm and status == 0)


def test_nodes_that_slurm_lost_are_recorded(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sinfo.output").write_text("node8\nnode8\n")
    (tmp_path / "job.output").write_text(job_output("COMPLETING", "NodeDown", "None"))
    start("kill -TERM $PPID; exit 143")
    assert read_failures(tmp_path / "run") == []
    done = start("end 7 0; end 8 0", 1)
    assert (done.returncode, done.stderr) == (0, "")
    (failure,) = read_failures(tmp_path / "run")
    assert (failure.reason, failure.nodes) == ("lost by SLURM", ("node8",))
    assert "--nodes=node7,node8 --states=down," in calls(tmp_path, "sinfo")[0]
    # The second start ended by itself, so nodes that are down now were not lost under it.
    assert start("end 7 0; end 8 0", 2).returncode == 0
    assert calls(tmp_path, "sinfo") == []


def test_an_element_of_an_array_is_a_run_of_its_own(start: Start, tmp_path: Path) -> None:
    done = start("end 7 137; end 8 1; exit 1", elements=2)
    assert (done.returncode, done.stderr) == (1, "")
    assert calls(tmp_path, "scontrol") == [
        "scontrol requeue 16_1",
        "scontrol update JobId=16_1 ExcNodeList=bad[1-2],node7",
    ]
    assert [failure.job for failure in read_failures(tmp_path / "run/001")] == ["16_1"]
    assert not (tmp_path / "run/failures.jsonl").exists()


def test_the_end_of_a_job_needs_nothing_installed() -> None:
    program = "import sys, farspan.launch.slurm.requeue; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
