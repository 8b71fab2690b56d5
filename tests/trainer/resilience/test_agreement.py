from collections.abc import Callable

import pytest
import torch.distributed as dist

from farspan.errors import CheckpointError, ConfigError, DataError, FarspanError
from farspan.trainer.resilience.agreement import any_rank, check_same, on_first_rank, raise_on_all_ranks
from tests.support.rank_pool import RankPool


def fail(message: str) -> str:
    raise DataError(message)


def unsupported_reason(work: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(FarspanError) as refused:
        work()
    dist.barrier()
    return type(refused.value).__name__, str(refused.value)


def one_rank_fails() -> tuple[str, str]:
    return unsupported_reason(
        lambda: raise_on_all_ranks(lambda: fail("no such folder") if dist.get_rank() == 1 else "fine")
    )


def all_fail_alike() -> tuple[str, str]:
    return unsupported_reason(lambda: raise_on_all_ranks(lambda: fail("no such folder")))


def all_fail_differently() -> tuple[str, str]:
    return unsupported_reason(lambda: raise_on_all_ranks(lambda: fail(f"no folder {dist.get_rank()}")))


def first_fails() -> tuple[str, str]:
    def work() -> None:
        raise CheckpointError("it is damaged")

    return unsupported_reason(lambda: on_first_rank(work))


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        (one_rank_fails, ("DataError", "rank 1: no such folder")),
        (all_fail_alike, ("DataError", "no such folder")),
        (all_fail_differently, ("DataError", "rank 0: no folder 0")),
        (first_fails, ("CheckpointError", "it is damaged")),
    ],
)
def test_all_ranks_raise_what_one_finds(
    ranks: Callable[[int], RankPool], scenario: Callable[[], object], expected: tuple[str, str]
) -> None:
    assert ranks(2).run(scenario) == [expected] * 2


def results() -> tuple[object, object, list[bool]]:
    rank = dist.get_rank()
    flags = [any_rank(False), any_rank(rank == 0), any_rank(rank == 1), any_rank(True)]
    return raise_on_all_ranks(lambda: rank), on_first_rank(lambda: {"rank": rank}), flags


def test_results(ranks: Callable[[int], RankPool]) -> None:
    flags = [False, True, True, True]
    assert ranks(2).run(results) == [(0, {"rank": 0}, flags), (1, {"rank": 0}, flags)]


def compare(values: list[dict[str, object]]) -> str:
    try:
        check_same(values[dist.get_rank()])
    except ConfigError as error:
        return str(error)
    return "same"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([{"a": 1, "b": None}, {"a": 1, "b": None}], "same"),
        ([{"a": 1, "b": "x"}, {"a": 1, "b": "y"}], "b differs between ranks, 'x' on rank 0 and 'y' on rank 1"),
        ([{"a": 1}, {"a": 1, "b": 2}], "b differs between ranks, None on rank 0 and 2 on rank 1"),
    ],
)
def test_differences_are_refused_alike(
    ranks: Callable[[int], RankPool], values: list[dict[str, object]], expected: str
) -> None:
    messages = ranks(2).run(compare, values)
    assert messages[0] == messages[1]
    assert messages[0].startswith(expected)
