"""The rank of this process in the run, and the connection to all other ranks."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from farspan.errors import FarspanError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The rank of one process."""

    rank: int = 0
    world_size: int = 1
    # Among the ranks of its node: the index of its GPU.
    local_rank: int = 0
    # The scheduler's id of the run, if a scheduler started it.
    job: str | None = None


class NotConnectedError(FarspanError):
    """This rank has not found the others; unlike other errors of a run, each rank raises its own."""


@contextmanager
def connected(
    ranks: Ranks,
    device: torch.device,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    store: dist.Store | None = None,  # pyright: ignore[reportPrivateImportUsage]
) -> Iterator[None]:
    """Join the default process group inside the block: gloo for CPU tensors, NCCL for CUDA tensors.

    timeout: how long a rank waits for others before it raises. store: the rendezvous, fresh; without one, several ranks
    meet at MASTER_ADDR:MASTER_PORT, as torchrun sets them. Raises NotConnectedError if they do not meet.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    try:
        if store is None:
            # A single rank needs no rendezvous.
            alone = ranks.world_size == 1
            store = dist.HashStore() if alone else next(rendezvous("env://", timeout=timeout))[0]  # pyright: ignore[reportPrivateImportUsage]
        store.set_timeout(timeout)
        # With its GPU, NCCL connects now and splits this connection for other groups, instead of at their first use.
        # A single rank, such as a benchmark's, may never use NCCL.
        bound = device if ranks.world_size > 1 and _all_have_gpus(store, ranks.world_size, device) else None
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout, device_id=bound
        )
    except RuntimeError as error:  # DistError of torch's store is one, as are gloo's own errors
        raise NotConnectedError(
            f"rank {ranks.rank} cannot meet the others ({str(error).splitlines()[0].rstrip('.')}): start "
            f"WORLD_SIZE={ranks.world_size} ranks within parallel.timeout_s={timeout.total_seconds():g}, with a "
            "MASTER_ADDR that all reach and a MASTER_PORT that is free there."
        ) from error
    try:
        yield
    finally:
        _leave()


def _all_have_gpus(store: dist.Store, world_size: int, device: torch.device) -> bool:  # pyright: ignore[reportPrivateImportUsage]
    """Return on every rank whether all join with a GPU.

    A rank that lacks its own reports that over gloo, for which the others must not be waiting in NCCL.
    """
    store.add("ranks without a GPU", int(device.type != "cuda"))
    if store.add("ranks that joined", 1) == world_size:
        store.set("all have joined", "")
    store.wait(["all have joined"])
    return store.add("ranks without a GPU", 0) == 0


def _leave() -> None:
    """Destroy the process groups, with what torch has cached of them.

    DTensor's cache takes equal meshes for one: the next groups of this process would get meshes of these.
    """
    dist.destroy_process_group()
    _clear_sharding_prop_cache()


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory for the next tensor instead of returning it to Linux."""
    # Fresh memory costs a page fault per page; attention with few FLOPs per output, such as MoSA, gains up to a fifth.
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def share_timeout(source: dist.ProcessGroup, target: dist.ProcessGroup) -> None:
    """Give `target` the timeout of `source`; torch gives every new group half an hour."""
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
        _leave()
