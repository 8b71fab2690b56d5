"""The matrix on one rank and on two; see tests/support/matrix.py."""

from collections.abc import Callable

import pytest

from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import check_equals_one_process
from tests.support.rank_pool import RankPool


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int, mechanism: str) -> None:
    check_equals_one_process(ranks(degree), strategy, degree, mechanism)
