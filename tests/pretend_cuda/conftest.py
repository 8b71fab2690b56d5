"""Pools of ranks that pretend to have a GPU each; skipped where nothing builds the C++ half of it."""

from collections.abc import Iterator

import pytest

from tests.support.pretend_cuda import library
from tests.support.pretend_cuda.pool import PretendPools


@pytest.fixture(scope="session")
def pretend_ranks() -> Iterator[PretendPools]:
    """Return the session's pool of a given number of ranks."""
    if reason := library.missing_reason():
        pytest.skip(reason)
    with PretendPools() as pools:
        yield pools
