"""Fixtures for all tests: worlds of gloo ranks, one thread, poisoned fresh memory, the environment left as it was."""

import os
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from tests.support.processes import act_on_signals
from tests.support.rank_pool import RankPool

act_on_signals()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits longest, the jobs on SLURM, beside which all else is run."""
    items.sort(key=lambda item: item.path.parts[-3:-1] != ("tests", "slurm"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Return the session's pool of a given number of ranks."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for started in pools.values():
        started.stop()


@pytest.fixture(autouse=True)
def _one_thread_poisoned_memory() -> None:
    torch.set_num_threads(1)
    # In deterministic mode torch fills fresh memory with NaN, which shows any read of unwritten memory.
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    # Commands that run in this process set variables for the ranks that they become, which the next test must not have.
    with mock.patch.dict(os.environ):
        yield
