"""Baselines: context parallelism of torch and of installed packages, where they compute the same function."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.errors import ConfigError
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.planner import Heads, HeadShare
from farspan.parallel.comm import Channel, Traffic, Unconnected
from farspan.parallel.context_parallel.strategy import STRATEGIES, Queries
from farspan.parallel.layout import Shards
from farspan.tools.bench.contenders import backend_for
from farspan.tools.bench.on_rank import ContextContender, Planned, ShardedCase

SHARED_MEMORY_OP = "deepspeed_shm_comm"
"""DeepSpeed would compile it for minutes when it starts on a CPU, and works without."""


def context_baselines() -> dict[str, ContextContender]:
    """Return the baselines by name, installed or not."""
    return {baseline.name: baseline for baseline in (DeepSpeedUlysses(), TorchContextParallel())}


@final
@dataclass(frozen=True, slots=True)
class DeepSpeedUlysses(ContextContender):
    """deepspeed.sequence.layer.DistributedAttention around the kernel that our own strategies call."""

    name: str = "deepspeed_ulysses"

    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        if importlib.util.find_spec("deepspeed") is None:
            return "deepspeed is not installed."
        if layout != "contiguous":
            return f"{self.name} concatenates the ranks' tokens: measured where that is their order."
        if mechanism.routing_width:
            return f"{self.name} exchanges queries, keys and values only."
        if heads.kv % degree:
            return f"{self.name} needs the {heads.kv} KV heads to divide by the {degree} ranks: it repeats none."
        return None

    def plan(self, case: ShardedCase, channel: Channel) -> Planned:
        _start_deepspeed()
        attention, traffic = _local_attention(case, channel), Traffic()
        layer = importlib.import_module("deepspeed.sequence.layer")
        distributed = layer.DistributedAttention(attention, channel.group, scatter_idx=2, gather_idx=1)
        return Planned(
            case=case,
            attention=lambda q, k, v: distributed(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0)[0],
            queries=Queries(case.shards.index.flatten(), case.shape.heads.query // channel.size),
            traffic=traffic,
            counting=partial(CountedExchanges, traffic, channel.size),
        )


def _start_deepspeed() -> None:
    importlib.import_module("deepspeed.ops").__compatible_ops__[SHARED_MEMORY_OP] = False
    comm = importlib.import_module("deepspeed.comm")
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _local_attention(case: ShardedCase, channel: Channel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention of `[1, T, H/P, D]`, this rank's share of the heads, over all tokens."""
    heads, local = case.shape.heads, case.shape.heads.query // channel.size
    share = HeadShare(all_heads=heads, head_range=range(channel.rank * local, (channel.rank + 1) * local))
    rows = case.shards.rows.take(case.shards.index.flatten())
    shards = Shards(rows=rows, index=torch.arange(len(rows)).unsqueeze(0))
    single = STRATEGIES.get("single")(Unconnected(0, 1))
    attend = single.plan(case.mechanism, shards, share, backend=backend_for(case.mechanism, case.shape))
    return lambda q, k, v: attend(q[0], k[0], v[0]).unsqueeze(0)


class CountedExchanges(TorchDispatchMode):
    """Counts what all-to-alls of equal parts send; raises RuntimeError at any other collective."""

    def __init__(self, traffic: Traffic, size: int) -> None:
        super().__init__()
        self.traffic, self.size = traffic, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            if func is not torch.ops.c10d.alltoall_base_.default:
                raise RuntimeError(f"{func} is not counted")
            moved = args[1].nbytes * (self.size - 1) // self.size
            self.traffic.add("all_to_all", sent=moved, received=moved)
        return func(*args, **(kwargs or {}))


@final
@dataclass(frozen=True, slots=True)
class TorchContextParallel(ContextContender):
    """torch.distributed.tensor.experimental.context_parallel: a ring, for scaled_dot_product_attention."""

    name: str = "torch_context_parallel"
    packed: ClassVar[bool] = False

    def unsupported_reason(self, mechanism: Mechanism, layout: str, heads: Heads, degree: int) -> str | None:
        if mechanism != Dense(causal=True):
            return f"{self.name} computes dense causal attention over one document only."
        if layout != "zigzag":
            return f"{self.name} shards tokens in zigzag."
        return None

    def plan(self, case: ShardedCase, channel: Channel) -> Planned:
        if case.shards.tokens_local * channel.size != len(case.shards.rows):
            raise ConfigError(f"{self.name} needs tokens that divide by twice the ranks.")
        mesh = DeviceMesh.from_group(channel.group, case.shape.device.type)
        return Planned(
            case=case,
            attention=_sdpa,
            queries=Queries(case.shards.index[channel.rank], case.shape.heads.query),
            scope=partial(_context_parallel, mesh),
        )


@contextmanager
def _context_parallel(mesh: DeviceMesh) -> Iterator[None]:
    """Let scaled_dot_product_attention take its arguments for this rank's shard, in zigzag."""
    from torch.distributed.tensor.experimental import context_parallel

    # It wants a buffer to shard, by whose length it decides for zigzag; our inputs are sharded already.
    buffer = torch.zeros(2 * mesh.size(), device=mesh.device_type)
    with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]):
        yield


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (k, v))
    # [T/P, H, D] -> [1, H, T/P, D]
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(0).transpose(0, 1)
