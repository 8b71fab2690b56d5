"""Tiny data that is prepared once, a run on it, and the truth about its first steps."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import metrics
from farspan.trainer.config import Config
from tests.support import tiny
from tests.support.rank_pool import Pools
from tests.support.steps import Trajectory, assert_same, initial_parameters, train_reference, train_sharded

Truth = Callable[[Config], Trajectory]
TrainAndCompare = Callable[[Config], list[Trajectory]]


@pytest.fixture(scope="session", autouse=True)
def _known_peak_flops() -> Iterator[None]:
    """Measuring them would take longer than a tiny run."""
    with mock.patch.object(metrics, "peak_flops", return_value=1e10):
        yield


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="farspan")
    return caplog


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only read it."""
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def base(tiny_data: Path) -> Config:
    """A run in one process that writes nothing; its learning rate rises for three steps and falls in the last two."""
    return tiny.config(tiny_data, Path("nowhere"), ParallelConfig(strategy="single"), steps=5)


@pytest.fixture(scope="session")
def truth(ranks: Pools) -> Truth:
    """Return a function that trains in one process by formula, see `decoder.py`, as any ranks should."""
    known: dict[str, Trajectory] = {}

    def compute(config: Config) -> Trajectory:
        train = replace(config.train, compute_dtype="float64", recompute="none")
        single = replace(config, parallel=ParallelConfig(strategy="single"), train=train)
        key = str(single)
        if key not in known:
            known[key] = train_reference(single, ranks(1).run(initial_parameters, single)[0])
        return known[key]

    return compute


@pytest.fixture(scope="session")
def train_and_compare(ranks: Pools, truth: Truth) -> TrainAndCompare:
    """Return a function that trains on ranks, compares each with the truth and returns their trajectories."""

    def compare(config: Config) -> list[Trajectory]:
        trajectories = ranks(data_groups(config.parallel) * config.parallel.context).run(train_sharded, config)
        for trajectory in trajectories:
            assert_same(trajectory, truth(config))
        return trajectories

    return compare


def data_groups(parallel: ParallelConfig) -> int:
    return parallel.dp_replicate * max(parallel.dp_shard, 1)
