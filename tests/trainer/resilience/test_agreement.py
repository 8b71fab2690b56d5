import pytest
import torch.distributed as dist

from farspan.errors import ConfigError, DataError, FarspanError
from farspan.trainer.resilience.agreement import any_rank, check_same, on_first_rank, raise_on_all_ranks
from tests.support.rank_pool import Pools, error_of


def fail(message: str) -> str:
    raise DataError(message)


def scenario(fails: dict[int, str], on_first: bool) -> tuple[str, str]:
    """On a rank: the error of work that fails on some ranks with a message, or of work of the first rank."""

    def work() -> str:
        message = fails.get(dist.get_rank())
        return fail(message) if message else "fine"

    with pytest.raises(FarspanError) as refused:
        on_first_rank(work) if on_first else raise_on_all_ranks(work)
    dist.barrier()
    return type(refused.value).__name__, str(refused.value)


@pytest.mark.parametrize(
    ("fails", "on_first", "message"),
    [
        ({1: "no such folder"}, False, "rank 1: no such folder"),
        ({0: "no such folder", 1: "no such folder"}, False, "no such folder"),
        ({0: "no folder 0", 1: "no folder 1"}, False, "rank 0: no folder 0"),
        ({0: "it is damaged"}, True, "it is damaged"),
    ],
)
def test_all_ranks_raise_the_error_of_one(ranks: Pools, fails: dict[int, str], on_first: bool, message: str) -> None:
    assert ranks(2).run(scenario, fails, on_first) == [("DataError", message)] * 2


def results() -> tuple[object, object, list[bool]]:
    rank = dist.get_rank()
    flags = [any_rank(False), any_rank(rank == 0), any_rank(rank == 1), any_rank(True)]
    return raise_on_all_ranks(lambda: rank), on_first_rank(lambda: {"rank": rank}), flags


def test_results(ranks: Pools) -> None:
    flags = [False, True, True, True]
    assert ranks(2).run(results) == [(0, {"rank": 0}, flags), (1, {"rank": 0}, flags)]


def compare(values: list[dict[str, object]]) -> None:
    check_same(values[dist.get_rank()])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{"a": 1, "b": "x"}, {"a": 1, "b": "y"}], "b differs between ranks, 'x' on rank 0 and 'y' on rank 1"),
        ([{"a": 1}, {"a": 1, "b": 2}], "b differs between ranks, None on rank 0 and 2 on rank 1"),
        ([{"a": 1, "b": 2}, {"a": 1}], "b differs between ranks, 2 on rank 0 and None on rank 1"),
    ],
)
def test_all_ranks_refuse_differences(ranks: Pools, values: list[dict[str, object]], expected: str) -> None:
    messages = ranks(2).run(error_of, ConfigError, compare, values)
    assert messages[0] == messages[1]
    assert messages[0].startswith(expected)
    ranks(2).run(compare, values[:1] * 2)
