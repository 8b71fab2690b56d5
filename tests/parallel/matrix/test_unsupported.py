"""Which accesses each strategy serves, so that no pair of the matrix is empty by accident."""

import pytest

from farspan.kernels.mechanism import MECHANISMS, Access
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import DEGREES, is_refused_whatever_the_heads

MOVE_KEYS = {Access.MASK, Access.BLOCKS, Access.LIFETIMES}
SERVED: dict[str, set[Access]] = {
    **dict.fromkeys(("ring", "double_ring", "gather", "fetch"), MOVE_KEYS),
    "ship": {Access.BLOCKS},
    "state": {Access.STATE},
}
"""The accesses that strategies serve; the others serve all. A strategy that refuses some has to be put here."""


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_accesses_decide_what_a_strategy_takes(strategy: str) -> None:
    """At a degree that suits it."""
    for name in MECHANISMS:
        refused = all(is_refused_whatever_the_heads(strategy, degree, name) for degree in DEGREES)
        served = MECHANISMS.get(name).examples()[0].accesses <= SERVED.get(strategy, set(Access))
        assert refused != served, name
