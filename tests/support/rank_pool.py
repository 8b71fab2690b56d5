"""Pools of real gloo ranks for tests: one thread each, fresh memory full of NaN."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.ranks import Ranks
from farspan.tools import rank_pool
from farspan.tools.rank_pool import RankError, grid_groups

__all__ = ["COLLECTIVE_TIMEOUT_S", "PRELOAD", "Pools", "RankError", "RankPool", "error_of", "world_channel"]
COLLECTIVE_TIMEOUT_S = 120
CALL_TIMEOUT_S = 300
"""Only what hangs comes near them, however slow the machine is."""
PRELOAD = "tests.support.preload"


@contextmanager
def _join(ranks: Ranks, store: dist.Store) -> Iterator[tuple[()]]:  # pyright: ignore[reportPrivateImportUsage]
    torch.set_num_threads(1)
    # In deterministic mode torch fills fresh memory with NaN.
    torch.use_deterministic_algorithms(True)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
    yield ()
    dist.destroy_process_group()


class RankPool(rank_pool.RankPool):
    """A world of gloo ranks that serves one function call at a time."""

    def __init__(self, size: int) -> None:
        super().__init__(size, _join, preload=PRELOAD, timeout_s=CALL_TIMEOUT_S)

    def stop(self) -> None:
        """End all ranks at once: some tests leave them waiting for each other."""
        self.kill()


def world_channel(width: int = 1) -> Channel:
    """On a rank: return the channel of all ranks, a grid if `width`, the size of its inner axis, is more than 1."""
    traffic = Traffic()
    group = dist.group.WORLD
    assert group is not None
    if width == 1:
        return Channel(group, traffic)
    inner, outer = (Channel(axis, traffic) for axis in grid_groups(width))
    return Channel(group, traffic, inner=inner, outer=outer)


Pools = Callable[[int], RankPool]
"""The fixture `ranks`: the session's pool of a given number of ranks."""


def error_of(kind: type[Exception], function: Callable[..., object], *arguments: object) -> str:
    """On a rank: return the error that ends a call on all ranks."""
    with pytest.raises(kind) as refused:
        function(*arguments)
    dist.barrier()
    return str(refused.value)
