"""Every mechanism under every strategy and degree, against one process in float64; see farspan/testing.py.

The tests are in tests/parallel/matrix.
"""

from collections.abc import Callable

import pytest

from farspan import testing
from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.testing import (
    DOCUMENTS,
    HEAD_DIM,
    HEADS,
    TINY,
    VALUE_DIM,
    Case,
    differences,
    differing_bytes,
    inner_size_for,
    label,
    one_process,
    run_cases,
    unshard,
)
from tests.support.rank_pool import RankPool

__all__ = [
    "DEGREES", "DOCUMENTS", "HEADS", "HEAD_DIM", "TINY", "VALUE_DIM", "Case", "cases_of", "differing_bytes",
    "inner_size_for", "is_refused_whatever_the_heads", "label", "matrix_test", "one_process", "run_cases", "unshard",
]  # fmt: skip
TURNS = {1: (0,), 2: (1,), 4: (0, 2), 8: (3,)}
"""Which layouts an example has at each degree, from a first one on that changes with example, mechanism and strategy:
over all degrees it has every layout."""
DEGREES = list(TURNS)


def cases_of(strategy: str, degree: int, mechanism_name: str) -> list[Case]:
    """Every example, if the strategy admits it."""
    shift, examples = list(MECHANISMS).index(mechanism_name), MECHANISMS.get(mechanism_name).examples()
    return [
        case
        for number, mechanism in enumerate(examples)
        for case in testing.cases_of(mechanism, strategy, degree, TURNS[degree], number=number, shift=shift)
    ]


def matrix_test(strategies: list[str], degrees: list[int]) -> Callable[..., None]:
    """Return the test of these strategies and degrees with every mechanism."""

    @pytest.mark.parametrize("mechanism", list(MECHANISMS))
    @pytest.mark.parametrize("degree", degrees)
    @pytest.mark.parametrize("strategy", strategies)
    def equals_one_process(ranks: Callable[[int], RankPool], strategy: str, degree: int, mechanism: str) -> None:
        """Pairs without a case must be refused whatever the heads."""
        cases = cases_of(strategy, degree, mechanism)
        if not cases:
            assert is_refused_whatever_the_heads(strategy, degree, mechanism)
            return
        wrong = differences(cases, ranks(degree).run(run_cases, cases))
        assert not wrong, f"of {len(cases)} cases these differ from one process or their formula:\n" + "\n".join(wrong)

    return equals_one_process


def is_refused_whatever_the_heads(strategy: str, degree: int, mechanism: str) -> bool:
    """Whether a pair may have no case: the strategy does not serve its accesses, or the degree does not suit it."""
    example = MECHANISMS.get(mechanism).examples()[0]
    inner_size = inner_size_for(strategy, degree, turn=0)
    return all(
        STRATEGIES.get(strategy).unsupported_reason(example, heads, degree, inner_size) is not None for heads in HEADS
    )
