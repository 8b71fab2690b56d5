"""The matrix on eight ranks, every other strategy of the registry; see tests/support/matrix.py."""

from collections.abc import Callable

import pytest

from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import check_equals_one_process
from tests.support.rank_pool import RankPool


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
@pytest.mark.parametrize("degree", [8])
@pytest.mark.parametrize("strategy", list(STRATEGIES)[::2])
def test_equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int, mechanism: str) -> None:
    check_equals_one_process(ranks(degree), strategy, degree, mechanism)
