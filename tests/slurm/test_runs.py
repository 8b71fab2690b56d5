"""Runs on two nodes with two ranks each: the same losses, to the bit, as four ranks of one machine, whatever comes
between."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import EvaluateConfig
from farspan.trainer.config_io import to_toml
from tests.slurm.conftest import Cluster
from tests.trainer import tiny

STEPS = 60
FARSPAN = [sys.executable, "-m", "farspan.launch.cli"]


def records(run: Path) -> list[dict[str, float]]:
    """Return what is on record so far; a line may be half written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(record["step"], record["loss"]) for record in records(run) if "loss" in record]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm runs")
    parallel = ParallelConfig(context=2, dp_shard=2)
    config = tiny.config(tiny.make_data(folder), folder / "run", parallel, steps=STEPS)
    config = replace(config, evaluate=EvaluateConfig(every_steps=0, sequences=2))
    (folder / "run.toml").write_text(to_toml(config))
    return folder / "run.toml"


@pytest.fixture(scope="session")
def undisturbed(config_file: Path) -> list[tuple[float, float]]:
    """The losses of four ranks on this machine."""
    run = config_file.parent / "undisturbed"
    assert cli.main(["launch", "local", str(config_file), "--gpus-per-node", "4", f"run.folder={run}"]) == 0
    found = losses(run)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found


def launch(cluster: Cluster, config_file: Path, run: Path, *options: str) -> list[str]:
    """Submit a run and return the ids of its jobs."""
    shape = ["--nodes", "2", "--gpus-per-node", "2", "--time", "20"]
    cluster.run([*FARSPAN, "launch", "slurm", str(config_file), *shape, *options, f"run.folder={run}"])
    return [json.loads(line)["job"] for line in (run / "jobs.jsonl").read_text().splitlines()]


def test_a_run_that_slurm_warns_is_queued_again_and_ends_as_if_undisturbed(
    cluster: Cluster, config_file: Path, undisturbed: list[tuple[float, float]]
) -> None:
    run = config_file.parent / "warned"
    (job,) = launch(cluster, config_file, run)
    wait_for(lambda: len(records(run)) >= 3, "three steps")
    cluster.run(["scancel", "--signal=USR1", job])
    log = run / "logs" / f"{job}.log"
    try:
        wait_for(lambda: "farspan: warned by SLURM" in log.read_text(), "requeue")
        done = len(losses(run))
        assert 3 <= done < STEPS
        cluster.await_state(job, "COMPLETED", "FAILED")
    finally:
        print(log.read_text())
    assert cluster.state(job) == "COMPLETED"
    assert losses(run) == undisturbed


def test_a_chain_of_jobs_goes_on_where_the_first_was_cancelled(
    cluster: Cluster, config_file: Path, undisturbed: list[tuple[float, float]]
) -> None:
    run = config_file.parent / "chain"
    first, second = launch(cluster, config_file, run, "--task-per-rank", "--chain", "2")
    wait_for(lambda: len(records(run)) >= 3, "three steps")
    assert cluster.state(second) == "PENDING"
    cluster.run(["scancel", first])
    cluster.await_state(first, "CANCELLED")
    try:
        cluster.await_state(second, "COMPLETED", "FAILED")
    finally:
        for job in (first, second):
            print((run / "logs" / f"{job}.log").read_text())
    assert cluster.state(second) == "COMPLETED"
    assert losses(run) == undisturbed
