"""Runs on two nodes with two ranks each: whatever happens to them, they end with the same losses, to the bit, as four
ranks on one machine."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.launch.slurm.history import add_failure, read_failures, read_submissions
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, EvaluateConfig
from farspan.trainer.state import records
from farspan.trainer.toml_config import to_toml
from tests.slurm.conftest import Cluster
from tests.support import tiny
from tests.support.processes import parent_of, ranks_of, send, wait_for

STEPS = 40
Losses = list[tuple[float, float]]
Undisturbed = Callable[[], Losses]
FARSPAN = [sys.executable, "-m", "farspan.launch.cli"]


def losses(run: Path) -> Losses:
    return [(record["step"], record["loss"]) for record, _ in records(run / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm runs")
    parallel = ParallelConfig(context=2, dp_shard=2)
    config = tiny.config(tiny.make_data(folder), folder / "run", parallel, steps=STEPS)
    config = replace(
        config, evaluate=EvaluateConfig(every_steps=0, sequences=2), checkpoint=CheckpointConfig(every_steps=5)
    )
    (folder / "run.toml").write_text(to_toml(config))
    return folder / "run.toml"


@pytest.fixture(scope="session")
def undisturbed(config_file: Path) -> Iterator[Undisturbed]:
    """Return the losses of four ranks on this machine, which train while tests wait for SLURM."""
    run = config_file.parent / "undisturbed"
    command = [*FARSPAN, "launch", "local", str(config_file), "--gpus-per-node", "4", f"run.folder={run}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def found() -> Losses:
            output = process.communicate()[0] if process.poll() is None else ""
            assert process.returncode == 0, output
            assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
            return losses(run)

        yield found
        process.kill()


def launch(cluster: Cluster, config_file: Path, run: Path, *options: str) -> list[str]:
    """Submit a run and return the ids of its jobs."""
    shape = ["--nodes", "2", "--gpus-per-node", "2", "--time", "20"]
    cluster.run([*FARSPAN, "launch", "slurm", str(config_file), *shape, *options, f"run.folder={run}"])
    return jobs(run)


def jobs(run: Path) -> list[str]:
    return [submission.job for submission in read_submissions(run)]


def logs(run: Path, job: str, restart: int) -> Path:
    return run / "logs" / job / str(restart)


def nodes(run: Path, job: str, restart: int) -> list[str]:
    return (logs(run, job, restart) / "nodes").read_text().split()


def await_success(cluster: Cluster, run: Path, job: str) -> None:
    try:
        cluster.await_state(job, "COMPLETED", "FAILED")
    finally:
        print((run / "logs" / f"{job}.log").read_text())
    assert cluster.state(job) == "COMPLETED"


def test_ranks_are_on_two_nodes(cluster: Cluster) -> None:
    printed = cluster.run(["srun", "--nodes=2", "--ntasks-per-node=2", "hostname"]).stdout.split()
    assert sorted(printed) == ["n1", "n1", "n2", "n2"]


def pause(run: Path, job: str, restart: int) -> dict[int, int]:
    """Wait until a start of the job has done a step, pause its ranks and return their processes."""
    log = logs(run, job, restart) / "rank_0.log"
    step = re.compile(rf"^step +\d+/{STEPS}  ", re.MULTILINE)
    try:
        wait_for(lambda: log.exists() and step.search(log.read_text()), f"a step of start {restart}")
    except AssertionError:
        print((run / "logs" / f"{job}.log").read_text())
        raise
    ranks = ranks_of(run, job)
    assert [str(len(ranks))] == re.findall(r"^ranks +(\d+) ", log.read_text(), re.MULTILINE)
    assert sorted(ranks) == list(range(len(ranks)))
    send(signal.SIGSTOP, ranks.values())
    return ranks


def test_a_disturbed_run_ends_as_if_undisturbed(cluster: Cluster, config_file: Path, undisturbed: Undisturbed) -> None:
    """One job, so that each fault costs one start: a time limit, a preemption, a killed rank, a lost node."""
    run = config_file.parent / "disturbed"
    (job,) = launch(cluster, config_file, run)
    update = ["scontrol", "update", f"JobId={job}"]

    # The time limit is near. SLURM itself sends the warning and, as with any signal, SIGCONT.
    pause(run, job, 0)
    cluster.run([*update, "TimeLimit=5"])
    wait_for(lambda: cluster.state(job) == "PENDING", "requeue")
    cluster.run([*update, "TimeLimit=20"])

    # A job of higher priority preempts it.
    pause(run, job, 1)
    shape = ["--partition=first", "--nodes=3", "--ntasks-per-node=2"]
    other = cluster.sbatch(*shape, "--output=/dev/null", "--wrap=sleep 1")
    cluster.await_state(other, "COMPLETED")

    # A rank is killed.
    ranks = pause(run, job, 2)
    send(signal.SIGKILL, [ranks[3]])
    send(signal.SIGCONT, ranks.values())

    # SLURM loses a node, whose ranks live on.
    ranks = pause(run, job, 3)
    killed_on, lost = nodes(run, job, 2)[1], nodes(run, job, 3)[1]
    assert killed_on not in nodes(run, job, 3)
    cluster.kill_daemon(lost)
    wait_for(lambda: cluster.state(job) != "RUNNING", "the end of a job that lost a node")
    send(signal.SIGCONT, ranks.values())
    cluster.run([*update, "ExcNodeList="])
    await_success(cluster, run, job)
    assert lost not in nodes(run, job, 4)
    # Virtual nodes are called like their hosts.
    ended = [path.read_text().split() for path in logs(run, job, 4).glob("ended/*")]
    assert sorted(ended) == [[node, node, "0"] for node in sorted(nodes(run, job, 4))]
    assert losses(run) == undisturbed()
    failures = [(failure.reason, failure.nodes) for failure in read_failures(run)]
    assert failures == [(f"a rank on {killed_on} was killed by SIGKILL", (killed_on,)), ("lost by SLURM", (lost,))]
    cluster.power_off(lost)
    cluster.power_on(lost)


@pytest.mark.faults
def test_a_run_whose_nodes_lose_power(cluster: Cluster, config_file: Path, undisturbed: Undisturbed) -> None:
    run = config_file.parent / "powerless"
    (job,) = launch(cluster, config_file, run)
    # First, one rank alone gets a warning.
    ranks = pause(run, job, 0)
    send(signal.SIGUSR1, [ranks[2]])
    send(signal.SIGCONT, ranks.values())
    # The second node, then the first, which runs the batch script.
    for restart, place in enumerate((1, 0), start=1):
        pause(run, job, restart)
        lost = nodes(run, job, restart)[place]
        cluster.power_off(lost)
        wait_for(lambda count=restart: len(read_failures(run)) == count, f"a record of {lost} at the next start")
        assert read_failures(run)[-1].nodes == (lost,)
        cluster.power_on(lost)
    await_success(cluster, run, job)
    assert losses(run) == undisturbed()


@pytest.mark.faults
def test_ranks_of_a_torchrun_that_is_killed_save_and_the_job_goes_on(cluster: Cluster, config_file: Path) -> None:
    run = config_file.parent / "without torchrun"
    shape = ["--nodes", "1", "--gpus-per-node", "2", "parallel.dp_shard=1", f"run.folder={run}"]
    cluster.run([*FARSPAN, "launch", "slurm", str(config_file), *shape])
    (job,) = jobs(run)
    ranks = pause(run, job, 0)
    # Between torchrun and each rank is a shell.
    (torchrun,) = {parent_of(parent_of(rank)) for rank in ranks.values()}
    send(signal.SIGKILL, [torchrun])
    send(signal.SIGCONT, ranks.values())
    await_success(cluster, run, job)
    log = (run / "logs" / f"{job}.log").read_text()
    assert re.search(r"0: stopped     at step (\d+)(.*\n)+0: resumed     at step \1 (.*\n)+0: finished ", log)


@pytest.mark.faults
def test_runs_of_an_array_are_resumed_one_by_one(cluster: Cluster, config_file: Path, undisturbed: Undisturbed) -> None:
    runs = config_file.parent / "array"
    shape = ["--nodes", "1", "--gpus-per-node", "1", "--task-per-rank", "--each", "run.seed=11,12"]
    changes = ["parallel.context=1", "parallel.dp_shard=1", f"run.folder={runs}"]
    cluster.run([*FARSPAN, "launch", "slurm", str(config_file), *shape, *changes])
    (first,), (second,) = jobs(runs / "000"), jobs(runs / "001")
    # Though elements share a name, none waits for the other.
    metrics = runs / "000" / "metrics.jsonl"
    wait_for((runs / "001" / "metrics.jsonl").exists, "the start of the second")
    wait_for(lambda: metrics.exists() and losses(runs / "000"), "a step of the first")
    send(signal.SIGKILL, ranks_of(runs, first).values())
    for job in (first, second):
        cluster.await_state(job, "COMPLETED", "FAILED")
    status = cluster.run([*FARSPAN, "jobs", "status", str(runs)]).stdout
    print(status)
    rows = [line.split() for line in status.splitlines() if line.startswith((first, second))]
    assert [row[:2] for row in rows] == [[first, "COMPLETED"], [second, "COMPLETED"]]
    starts = [
        [path.name for path in logs(runs / name, job, 0).parent.iterdir()]
        for name, job in (("000", first), ("001", second))
    ]
    assert [sorted(names) for names in starts] == [["0", "1"], ["0"]]
    assert [loss for _, loss in losses(runs / "000")] == pytest.approx([loss for _, loss in undisturbed()], abs=1e-9)
    assert losses(runs / "001") != losses(runs / "000")
    cluster.run([*FARSPAN, "jobs", "resume", str(runs / "000")])
    await_success(cluster, runs / "000", last := jobs(runs / "000")[-1])
    log = (runs / "000" / "logs" / f"{last}.log").read_text()
    assert re.search(rf"finished    already, at step {STEPS}", log)


@pytest.mark.faults
def test_a_chain_continues_after_a_canceled_job(cluster: Cluster, config_file: Path, undisturbed: Undisturbed) -> None:
    run = config_file.parent / "chain"
    # The stop may come in a step or in a save, in which the other ranks then wait.
    limits = ["watchdog.step_s=10", "watchdog.save_s=10"]
    first, second = launch(cluster, config_file, run, "--task-per-rank", "--chain", "2", *limits)
    ranks = pause(run, first, 0)
    send(signal.SIGCONT, [ranks[rank] for rank in (0, 1, 2)])
    pause(run, first, 1)
    assert cluster.state(second) == "PENDING"
    cluster.run(["scancel", first])
    cluster.await_state(first, "CANCELLED")
    await_success(cluster, run, second)
    assert losses(run) == undisturbed()
    assert [failure.reason for failure in read_failures(run)] == ["ranks hung"]
    assert list((run / "stacks").glob("*/rank_*"))
    log = (run / "logs" / f"{second}.log").read_text()
    assert re.search(rf"0: resumed     at step \d+ from .*\n(.*\n)*0: finished    at step {STEPS}\n", log)
    rank_logs = logs(run, second, 0)
    assert sorted(path.name for path in rank_logs.glob("rank_*")) == [f"rank_{rank}.log" for rank in range(4)]
    assert len(re.findall(rf"^step +\d+/{STEPS}  ", (rank_logs / "rank_0.log").read_text(), re.MULTILINE)) < STEPS
    states = cluster.run([*FARSPAN, "jobs", "status", str(run)]).stdout.splitlines()
    assert [line.split()[:2] for line in states[1:3]] == [[first, "CANCELLED"], [second, "COMPLETED"]]
    assert re.fullmatch(rf"step {STEPS}  loss \d\.\d{{4}}  [\d,]+ tok/s  \d+ s ago", states[-1])


def submit(cluster: Cluster, call: str) -> str:
    """Submit with submitit, from a program on the head node, and return the number of the job."""
    program = f"import farspan.launch; job = farspan.launch.{call}; print(getattr(job, 'job_id', job))"
    return cluster.run([sys.executable, "-c", program]).stdout.split()[-1]


def submitit_job(run: Path, job: str) -> Any:
    return importlib.import_module("submitit").SlurmJob(run / "submitted/001/submitit", job)


needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@needs_submitit
def test_a_disturbed_job_of_submitit_ends_as_if_undisturbed(
    cluster: Cluster, config_file: Path, undisturbed: Undisturbed
) -> None:
    """A time limit and a preemption, without the node where the run has failed before."""
    run = config_file.parent / "of submitit"
    run.mkdir()
    add_failure(run, "0", "a rank was killed", ["n2"])
    job = submit(
        cluster,
        f"submit({str(config_file)!r}, nodes=2, gpus_per_node=2, time='20', task_per_rank=True, "
        f"overrides={{'run.folder': {str(run)!r}}})",
    )
    of_submitit = submitit_job(run, job)
    update = ["scontrol", "update", f"JobId={job}"]

    pause(run, job, 0)
    cluster.run([*update, "TimeLimit=5"])
    wait_for(lambda: cluster.state(job) == "PENDING", "requeue")
    assert not of_submitit.paths.result_pickle.exists()
    cluster.run([*update, "TimeLimit=20"])

    pause(run, job, 1)
    shape = ["--partition=first", "--nodes=3", "--ntasks-per-node=2"]
    other = cluster.sbatch(*shape, "--output=/dev/null", "--wrap=sleep 1")
    cluster.await_state(other, "COMPLETED")
    await_success(cluster, run, job)
    assert losses(run) == undisturbed()
    assert [nodes(run, job, restart) for restart in range(3)] == [["n1", "n3"]] * 3
    result = of_submitit.result()
    assert (result.folder, result.step, result.loss) == (run, *undisturbed()[-1])
    assert of_submitit.stdout().count("0: resumed     at step ") == 2
    assert not logs(run, job, 3).exists()


@needs_submitit
def test_a_sweep_of_submitit_is_an_array_whose_failed_run_says_why(cluster: Cluster, config_file: Path) -> None:
    """One run ends well, one is canceled and one fails; two run at a time."""
    runs, data = config_file.parent / "sweep", config_file.parent / "copied tokens"
    shutil.copytree(config_file.parent / "tokens", data)
    options = (
        f"at_most=2, task_per_rank=True, overrides=['run.folder={runs}', 'parallel.context=1', 'parallel.dp_shard=1']"
    )
    sweep = [{"run.seed": 11}, {"run.seed": 12}, {"data.folder": str(data)}]
    submit(cluster, f"submit_sweep({str(config_file)!r}, {sweep}, {options})")
    ids = [jobs(runs / name)[0] for name in ("000", "001", "002")]
    for number in (0, 1):
        wait_for((runs / f"00{number}" / "metrics.jsonl").exists, f"the start of {number}")
        send(signal.SIGSTOP, ranks_of(runs, ids[number]).values())
    assert cluster.run(["squeue", "-h", "-r", "-j", ids[2], "-o", "%T %r"]).stdout == "PENDING JobArrayTaskLimit\n"
    shutil.rmtree(data)
    cluster.run(["scancel", ids[1]])
    send(signal.SIGCONT, ranks_of(runs, ids[0]).values())
    for job in ids:
        cluster.await_state(job, "COMPLETED", "FAILED", "CANCELLED")
    assert [cluster.state(job) for job in ids] == ["COMPLETED", "CANCELLED", "FAILED"]
    found = [submitit_job(runs, job) for job in ids]
    assert [job.paths.result_pickle.exists() for job in found] == [True, False, True]
    assert found[0].result().step == STEPS
    error = str(found[2].exception())
    assert f"TrainingError: data.folder='{data}' does not exist: make it with `farspan data prepare`" in error


def test_pending_jobs_are_canceled_together(cluster: Cluster, tmp_path: Path) -> None:
    jobs = [cluster.sbatch("--hold", "--output=/dev/null", "--wrap=true") for _ in range(2)]
    lines = [json.dumps({"job": job, "script": "s", "submitted": "t"}) + "\n" for job in ("999", *jobs)]
    (tmp_path / "jobs.jsonl").write_text("".join(lines))
    command = [*FARSPAN, "jobs", "cancel", str(tmp_path)]
    assert cluster.run(command).stdout == f"canceled    {jobs[1]}, {jobs[0]}\n"
    assert [cluster.state(job) for job in jobs] == ["CANCELLED", "CANCELLED"]
    assert cluster.run(command).stdout.startswith("canceled    nothing")
    states = cluster.run([*FARSPAN, "jobs", "status", str(tmp_path)]).stdout
    assert re.search(r"^999 +ENDED", states, re.MULTILINE)
    assert states.endswith("\nno step yet\n")
