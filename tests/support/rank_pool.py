"""Pools of real gloo ranks for tests: one thread each, fresh memory full of NaN."""

from collections.abc import Callable

import pytest
import torch.distributed as dist

from farspan.testing import CALL_TIMEOUT_S, COLLECTIVE_TIMEOUT_S, join, world_channel
from farspan.tools import rank_pool
from farspan.tools.rank_pool import RankError

__all__ = ["COLLECTIVE_TIMEOUT_S", "PRELOAD", "Pools", "RankError", "RankPool", "error_of", "world_channel"]
PRELOAD = "tests.support.preload"


class RankPool(rank_pool.RankPool):
    """A world of gloo ranks that serves one function call at a time."""

    def __init__(self, size: int) -> None:
        super().__init__(size, join, preload=PRELOAD, timeout_s=CALL_TIMEOUT_S)

    def stop(self) -> None:
        """End all ranks at once: some tests leave them waiting for each other."""
        self.kill()


Pools = Callable[[int], RankPool]
"""The fixture `ranks`: the session's pool of a given number of ranks."""


def error_of(kind: type[Exception], function: Callable[..., object], *arguments: object) -> str:
    """On a rank: return the error that ends a call on all ranks."""
    with pytest.raises(kind) as refused:
        function(*arguments)
    dist.barrier()
    return str(refused.value)
