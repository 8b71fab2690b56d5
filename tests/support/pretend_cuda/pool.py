"""Pools of ranks that pretend to have a GPU each; gloo stands for NCCL."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from farspan.parallel.ranks import Ranks
from farspan.tools.rank_pool import RankPool
from tests.support.pretend_cuda.runtime import pretend
from tests.support.rank_pool import PRELOAD

CALL_TIMEOUT_S = 300


class PretendPools(AbstractContextManager["PretendPools"]):
    """One pool of each size, started when it is first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, size: int) -> RankPool:
        if size not in self._pools:
            self._pools[size] = RankPool(size, join, preload=PRELOAD, timeout_s=CALL_TIMEOUT_S)
        return self._pools[size]

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.kill()


@contextmanager
def join(ranks: Ranks, store: Any) -> Iterator[tuple[()]]:
    """Make this process a rank with a pretend GPU."""
    pretend()
    torch.set_num_threads(1)
    # In deterministic mode torch fills fresh memory with NaN.
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("cpu:gloo,cuda:gloo", store=store, rank=ranks.rank, world_size=ranks.world_size)
    yield ()
    dist.destroy_process_group()
