import os
from collections.abc import Iterator
from unittest import mock

import pytest

from farspan.errors import ConfigError
from farspan.launch.env import environment_with_threads, read_ranks
from farspan.parallel.ranks import Ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _empty_environment() -> Iterator[None]:
    with mock.patch.dict(os.environ, clear=True):
        yield


def test_without_torchrun_there_is_one_rank() -> None:
    assert read_ranks() == Ranks(rank=0, world_size=1, local_rank=0)


def test_ranks_are_those_of_torchrun() -> None:
    os.environ.update(TORCHRUN)
    assert read_ranks() == Ranks(rank=3, world_size=8, local_rank=1)


def test_ranks_know_their_slurm_job() -> None:
    os.environ["SLURM_JOB_ID"] = "17"
    assert read_ranks().job == "17"
    os.environ.update(TORCHRUN | {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"})
    assert read_ranks().job == "16_3"


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    os.environ.update({key: value for key, value in TORCHRUN.items() if key != name})
    with pytest.raises(ConfigError, match=rf"^RANK is set but {name} is not.*torchrun"):
        read_ranks()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "three"}, "RANK='three' in the environment must be an integer"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment must be an integer"),
        ({"RANK": "8"}, "RANK=8, LOCAL_RANK=1 do not fit WORLD_SIZE=8"),
        ({"LOCAL_RANK": "-1"}, "RANK=3, LOCAL_RANK=-1 do not fit WORLD_SIZE=8"),
    ],
)
def test_an_invalid_value_is_refused(changes: dict[str, str], message: str) -> None:
    os.environ.update(TORCHRUN | changes)
    with pytest.raises(ConfigError) as refused:
        read_ranks()
    assert str(refused.value).startswith(message)


def test_ranks_get_their_threads_and_the_rest_of_the_environment() -> None:
    os.environ["FARSPAN_TEST_MARKER"] = "1"
    environment = environment_with_threads(3)
    assert (environment["OMP_NUM_THREADS"], environment["FARSPAN_TEST_MARKER"]) == ("3", "1")
    os.environ["OMP_NUM_THREADS"] = "7"
    assert environment_with_threads(3)["OMP_NUM_THREADS"] == "7"
