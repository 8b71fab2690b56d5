"""Runs on two nodes with two ranks each: the same losses, to the bit, as four ranks of one machine, whatever comes
between."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.launch.slurm.failures import failures
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, EvaluateConfig
from farspan.trainer.state import records
from farspan.trainer.toml_config import to_toml
from tests.slurm.conftest import Cluster
from tests.support import tiny
from tests.support.processes import ranks_of, send, wait_for

STEPS = 40
Losses = list[tuple[float, float]]
FARSPAN = [sys.executable, "-m", "farspan.launch.cli"]


def losses(run: Path) -> Losses:
    return [(record["step"], record["loss"]) for record, _ in records(run / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm runs")
    parallel = ParallelConfig(context=2, dp_shard=2)
    config = tiny.config(tiny.make_data(folder), folder / "run", parallel, steps=STEPS)
    config = replace(
        config,
        evaluate=EvaluateConfig(every_steps=0, sequences=2),
        checkpoint=CheckpointConfig(every_steps=5),
    )
    (folder / "run.toml").write_text(to_toml(config))
    return folder / "run.toml"


@pytest.fixture(scope="session")
def undisturbed(config_file: Path) -> Iterator[Callable[[], Losses]]:
    """The losses of four ranks on this machine, which train while tests wait for SLURM."""
    run = config_file.parent / "undisturbed"
    command = [*FARSPAN, "launch", "local", str(config_file), "--gpus-per-node", "4", f"run.folder={run}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:

        def found() -> Losses:
            said = process.communicate()[0] if process.poll() is None else ""
            assert process.returncode == 0, said
            assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
            return losses(run)

        yield found
        process.kill()


def launch(cluster: Cluster, config_file: Path, run: Path, *options: str) -> list[str]:
    """Submit a run and return the ids of its jobs."""
    shape = ["--nodes", "2", "--gpus-per-node", "2", "--time", "20"]
    cluster.run([*FARSPAN, "launch", "slurm", str(config_file), *shape, *options, f"run.folder={run}"])
    return [json.loads(line)["job"] for line in (run / "jobs.jsonl").read_text().splitlines()]


def test_ranks_are_on_two_nodes(cluster: Cluster) -> None:
    printed = cluster.run(["srun", "--nodes=2", "--ntasks-per-node=2", "hostname"]).stdout.split()
    assert sorted(printed) == ["n1", "n1", "n2", "n2"]


def losses_so_far(run: Path) -> Losses:
    return losses(run) if (run / "metrics.jsonl").exists() else []


def hold(run: Path, job: str, restart: int) -> dict[int, int]:
    """Wait until a start of the job has done a step, hold its ranks there and return their processes."""
    log = run / "logs" / job / str(restart) / "rank_0.log"
    step = re.compile(rf"^step +\d+/{STEPS}  ", re.MULTILINE)
    wait_for(lambda: log.exists() and step.search(log.read_text()), f"a step of start {restart}")
    ranks = ranks_of(job)
    assert sorted(ranks) == [0, 1, 2, 3]
    send(signal.SIGSTOP, ranks.values())
    return ranks


def test_a_run_ends_as_if_undisturbed_whatever_comes_between(
    cluster: Cluster, config_file: Path, undisturbed: Callable[[], Losses]
) -> None:
    """One job, so that each fault costs one start."""
    run = config_file.parent / "disturbed"
    (job,) = launch(cluster, config_file, run)
    update = ["scontrol", "update", f"JobId={job}"]

    def nodes(restart: int) -> list[str]:
        return (run / "logs" / job / str(restart) / "nodes").read_text().split()

    try:
        # The time limit is near: SLURM itself gives the warning, and with any signal lets ranks go on.
        hold(run, job, 0)
        cluster.run([*update, "TimeLimit=5"])
        wait_for(lambda: cluster.state(job) == "PENDING", "requeue")
        cluster.run([*update, "TimeLimit=20"])

        # Others go first.
        hold(run, job, 1)
        other = cluster.sbatch(
            "--partition=first", "--nodes=3", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1"
        )
        cluster.await_state(other, "COMPLETED")

        # A rank is killed.
        ranks = hold(run, job, 2)
        send(signal.SIGKILL, [ranks[3]])
        send(signal.SIGCONT, ranks.values())

        # SLURM loses a node, whose ranks live on.
        ranks = hold(run, job, 3)
        assert nodes(2)[1] not in nodes(3)
        lost = nodes(3)[1]
        cluster.kill_daemon(lost)
        wait_for(lambda: cluster.state(job) != "RUNNING", "the end of a job that lost a node")
        send(signal.SIGCONT, ranks.values())
        cluster.run([*update, "ExcNodeList="])
        cluster.await_state(job, "COMPLETED", "FAILED")
        assert lost not in nodes(4)
    finally:
        print((run / "logs" / f"{job}.log").read_text())
    assert cluster.state(job) == "COMPLETED"
    assert losses(run) == undisturbed()
    failed = [(failure.reason, failure.nodes) for failure in failures(run)]
    assert failed == [
        (f"a rank on {nodes(2)[1]} was killed by SIGKILL", (nodes(2)[1],)),
        ("lost by SLURM", (lost,)),
    ]
    cluster.power_off(lost)
    cluster.power_on(lost)


@pytest.mark.faults
def test_a_run_ends_as_if_undisturbed_though_nodes_lose_their_power(
    cluster: Cluster, config_file: Path, undisturbed: Callable[[], Losses]
) -> None:
    run = config_file.parent / "powerless"
    (job,) = launch(cluster, config_file, run)
    # Before that, one rank is warned alone.
    ranks = hold(run, job, 0)
    send(signal.SIGUSR1, [ranks[2]])
    send(signal.SIGCONT, ranks.values())
    # The second node, then the first, on which the batch script is.
    for restart, place in enumerate((1, 0), start=1):
        hold(run, job, restart)
        lost = (run / "logs" / job / str(restart) / "nodes").read_text().split()[place]
        cluster.power_off(lost)
        wait_for(lambda count=restart: len(failures(run)) == count, f"word of {lost} at the next start")
        assert failures(run)[-1].nodes == (lost,)
        cluster.power_on(lost)
    cluster.await_state(job, "COMPLETED", "FAILED")
    print((run / "logs" / f"{job}.log").read_text())
    assert cluster.state(job) == "COMPLETED"
    assert losses(run) == undisturbed()


@pytest.mark.faults
def test_runs_of_an_array_start_again_and_are_resumed_one_by_one(
    cluster: Cluster, config_file: Path, undisturbed: Callable[[], Losses]
) -> None:
    runs = config_file.parent / "array"
    shape = ["--nodes", "1", "--gpus-per-node", "1", "--task-per-rank", "--each", "run.seed=11,12"]
    changes = ["parallel.context=1", "parallel.dp_shard=1", f"run.folder={runs}"]
    cluster.run([*FARSPAN, "launch", "slurm", str(config_file), *shape, *changes])
    first, second = (json.loads((runs / name / "jobs.jsonl").read_text())["job"] for name in ("000", "001"))
    # Though elements have one name, none waits for the other.
    wait_for((runs / "001" / "metrics.jsonl").exists, "the start of the second")
    wait_for(lambda: losses_so_far(runs / "000"), "a step of the first")
    send(signal.SIGKILL, ranks_of(first).values())
    for job in (first, second):
        cluster.await_state(job, "COMPLETED", "FAILED")
    status = cluster.run([*FARSPAN, "jobs", "status", str(runs)]).stdout
    print(status)
    rows = [line.split() for line in status.splitlines() if line.startswith((first, second))]
    assert [row[:2] for row in rows] == [[first, "COMPLETED"], [second, "COMPLETED"]]
    assert [
        sorted(path.name for path in (runs / name / "logs" / job).iterdir())
        for name, job in (("000", first), ("001", second))
    ] == [["0", "1"], ["0"]]
    assert [loss for _, loss in losses(runs / "000")] == pytest.approx([loss for _, loss in undisturbed()], abs=1e-9)
    assert losses(runs / "001") != losses(runs / "000")
    cluster.run([*FARSPAN, "jobs", "resume", str(runs / "000")])
    last = json.loads((runs / "000" / "jobs.jsonl").read_text().splitlines()[-1])["job"]
    cluster.await_state(last, "COMPLETED", "FAILED")
    assert f"finished    already, at step {STEPS}" in (runs / "000" / "logs" / f"{last}.log").read_text()


def test_a_chain_of_jobs_goes_on_where_the_first_hung_and_was_cancelled(
    cluster: Cluster, config_file: Path, undisturbed: Callable[[], Losses]
) -> None:
    run = config_file.parent / "chain"
    first, second = launch(cluster, config_file, run, "--task-per-rank", "--chain", "2", "watchdog.step_s=8")
    ranks = hold(run, first, 0)
    send(signal.SIGCONT, [ranks[rank] for rank in (0, 1, 2)])
    hold(run, first, 1)
    cluster.run(["scancel", first])
    assert cluster.state(second) == "PENDING"
    cluster.await_state(first, "CANCELLED")
    try:
        cluster.await_state(second, "COMPLETED", "FAILED")
    finally:
        for job in (first, second):
            print((run / "logs" / f"{job}.log").read_text())
    assert cluster.state(second) == "COMPLETED"
    assert losses(run) == undisturbed()
    assert [failure.reason for failure in failures(run)] == ["ranks hung"]
    assert len(list((run / "stacks").glob("*/rank_*"))) >= 3
    said = (run / "logs" / f"{second}.log").read_text()
    assert re.search(rf"0: resumed     at step \d+ from .*\n(.*\n)*0: finished    at step {STEPS}\n", said)
    logs = run / "logs" / second / "0"
    assert sorted(path.name for path in logs.glob("rank_*")) == [f"rank_{rank}.log" for rank in range(4)]
    assert len(re.findall(rf"^step +\d+/{STEPS}  ", (logs / "rank_0.log").read_text(), re.MULTILINE)) < STEPS
    states = cluster.run([*FARSPAN, "jobs", "status", str(run)]).stdout.splitlines()
    assert [line.split()[:2] for line in states[1:3]] == [[first, "CANCELLED"], [second, "COMPLETED"]]
    assert re.fullmatch(rf"step {STEPS}  loss \d\.\d{{4}}  [\d,]+ tok/s  \d+ s ago", states[-1])


def test_jobs_that_wait_are_cancelled_together(cluster: Cluster, tmp_path: Path) -> None:
    wait = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"]
    jobs = [cluster.run(wait).stdout.strip() for _ in range(2)]
    lines = [json.dumps({"job": job, "script": "s", "submitted": "t"}) + "\n" for job in ("999", *jobs)]
    (tmp_path / "jobs.jsonl").write_text("".join(lines))
    command = [*FARSPAN, "jobs", "cancel", str(tmp_path)]
    assert cluster.run(command).stdout == f"cancelled   {jobs[1]}, {jobs[0]}\n"
    assert [cluster.state(job) for job in jobs] == ["CANCELLED", "CANCELLED"]
    assert cluster.run(command).stdout == "cancelled   nothing: no job of this run is left\n"
    states = cluster.run([*FARSPAN, "jobs", "status", str(tmp_path)]).stdout
    assert "999" in states
    assert "ENDED" in states
    assert states.endswith("\nno step yet\n")
