"""This process's place among all processes of the run, and the connection to them."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """rank: of this process in the whole run. local_rank: among those of its node; says which GPU is its own.

    job: what a scheduler calls the run, if one started it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    job: str | None = None


@contextmanager
def connected(
    ranks: Ranks,
    device: torch.device,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    store: dist.Store | None = None,  # pyright: ignore[reportPrivateImportUsage]
) -> Iterator[None]:
    """Join the default process group for the time of the block: gloo for CPU tensors, NCCL for CUDA tensors.

    timeout: how long a rank waits for others before it raises. store: where the ranks meet; without one, more ranks
    than one meet at MASTER_ADDR:MASTER_PORT, as torchrun sets them.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    # One rank keeps the store to itself; None makes torch meet the others at the address in the environment.
    if store is None and ranks.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(
        backend,
        store=store,
        rank=ranks.rank if store else -1,
        world_size=ranks.world_size if store else -1,
        timeout=timeout,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next tensor, on Linux: fresh memory costs a page fault per page.

    Attention that computes little for each of its outputs, such as MoSA's, gains up to a fifth.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def share_timeout(source: dist.ProcessGroup, target: dist.ProcessGroup) -> None:
    """Let collectives of `target` give up as early as those of `source`; torch gives new groups half an hour."""
    if dist.get_backend(source) != "fake":
        timeout = source._get_backend(source._device_types[0]).options._timeout
        dist.distributed_c10d._set_pg_timeout(timeout, target)


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Join a default process group of `world_size` ranks without the other processes: shapes and memory, no data."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
