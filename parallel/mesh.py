"""Mesh: every rank's place on the axes dp_replicate x dp_shard x context, and the groups that follow from it.

Experts have axes of their own over the same ranks (folding, arXiv 2504.14960): dp_shard x context = expert_shard x
expert, neighbors hold different experts.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from farspan.errors import ConfigError
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.groups import device_mesh, group_along


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work.

    context: ranks that share one sequence.
    dp_shard: groups of ranks with sequences of their own that share one copy of the parameters; 0 takes what is left.
    dp_replicate: whole copies of the parameters (HSDP).
    expert: neighboring ranks that share out the experts of a layer; a divisor of dp_shard x context.
    context_inner: of those, neighbors with fast links, such as the GPUs of a node; for strategies of two levels.
    strategy: how queries meet keys of other ranks, a file of parallel/context_parallel/strategies; `auto` takes the
    fastest by the cost model and says why. inner_gbytes_per_s, outer_gbytes_per_s: what a rank sends in a second within
    its node and out of it, for `auto`; 0 takes what is usual.
    layout: which rank holds which tokens of a sequence: contiguous, zigzag, striped or balanced.
    timeout_s: how long a rank waits for others before it gives up; a rank that fails is noticed at once, and limits of
    [watchdog] act before, if they are no longer.
    rounded_gradients: whether gradients of keys and values travel in the dtype of these, in half the bytes; summed in
    float32 all the same.
    """

    context: int = field(default=1, metadata={"minimum": 1})
    dp_shard: int = field(default=0, metadata={"minimum": 0})
    dp_replicate: int = field(default=1, metadata={"minimum": 1})
    expert: int = field(default=1, metadata={"minimum": 1})
    context_inner: int = field(default=1, metadata={"minimum": 1})
    strategy: str = "ring"
    layout: str = "zigzag"
    rounded_gradients: bool = False
    inner_gbytes_per_s: float = field(default=0.0, metadata={"minimum": 0})
    outer_gbytes_per_s: float = field(default=0.0, metadata={"minimum": 0})
    timeout_s: int = field(default=1800, metadata={"minimum": 1})


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Sizes of the axes; the product of the first three is the number of ranks."""

    dp_replicate: int
    dp_shard: int
    context: int
    expert: int = 1

    @property
    def data(self) -> int:
        """How many sequences are worked on at the same time."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard(self) -> int:
        """Over how many ranks parameters are sharded: a context-parallel group shares its parameters too."""
        return self.dp_shard * self.context

    @staticmethod
    def resolve(config: ParallelConfig, num_ranks: int) -> "Degrees":
        """Fill in `dp_shard=0`; raises ConfigError when the degrees do not multiply to the number of ranks."""
        fixed = config.context * config.dp_replicate
        product = fixed * (config.dp_shard or 1)
        if num_ranks % product != 0 or (config.dp_shard and num_ranks != product):
            shard = f" x parallel.dp_shard={config.dp_shard}" if config.dp_shard else ""
            verb = "equal" if config.dp_shard else "divide"
            cure = "start another number of ranks"
            if num_ranks == 1:
                command = f"`farspan launch local CONFIG --gpus-per-node {product}`"
                cure = f"start {product} ranks with {command} (with --dry-run: --ranks {product})"
            raise ConfigError(
                f"parallel.context={config.context} x parallel.dp_replicate={config.dp_replicate}{shard} = {product} "
                f"must {verb} the number of ranks, {num_ranks}: change a degree, or {cure}."
            )
        if config.context % config.context_inner:
            raise ConfigError(
                f"parallel.context_inner={config.context_inner} must divide parallel.context={config.context}: "
                "change one of them."
            )
        dp_shard = config.dp_shard or num_ranks // fixed
        if dp_shard * config.context % config.expert:
            raise ConfigError(
                f"parallel.expert={config.expert} must divide dp_shard x context = {dp_shard} x {config.context}, the "
                "ranks that share a copy of the parameters: change one of them."
            )
        return Degrees(
            dp_replicate=config.dp_replicate, dp_shard=dp_shard, context=config.context, expert=config.expert
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Mesh:
    """The process groups of this rank and its coordinates.

    fsdp: parameters are sharded over its last axis and, for HSDP, replicated over its first. inner, outer: axes of the
    context group, where it is a grid.
    """

    degrees: Degrees
    device_type: str
    context: dist.ProcessGroup
    fsdp: DeviceMesh
    inner: dist.ProcessGroup | None
    outer: dist.ProcessGroup | None

    @staticmethod
    def build(config: ParallelConfig, device_type: str) -> "Mesh":
        """Build the mesh of the initialized default process group; every rank has to call it."""
        degrees = Degrees.resolve(config, dist.get_world_size())
        width = config.context_inner
        grid = {"data": degrees.data, "outer": degrees.context // width, "inner": width}
        return Mesh(
            degrees=degrees,
            device_type=device_type,
            context=group_along("context", {"data": degrees.data, "context": degrees.context}, "context"),
            fsdp=device_mesh("parameters", _replicated(degrees, {"shard": degrees.shard}), device_type),
            inner=group_along("inner", grid, "inner") if width > 1 else None,
            outer=group_along("outer", grid, "outer") if width > 1 else None,
        )

    @cached_property
    def experts(self) -> DeviceMesh:
        """Parameters of experts are dealt over its axis `expert`, sharded over `shard` and, for HSDP, replicated.

        Every rank has to ask for it, as its groups are made then.
        """
        shape = {"shard": self.degrees.shard // self.degrees.expert, "expert": self.degrees.expert}
        return device_mesh("experts", _replicated(self.degrees, shape), self.device_type)

    @property
    def expert(self) -> dist.ProcessGroup:
        """The ranks that hold all experts between them."""
        return self.experts.get_group("expert")

    @property
    def data_rank(self) -> int:
        """Which of the groups that share a sequence this rank is in."""
        return dist.get_rank() // self.degrees.context

    @property
    def context_rank(self) -> int:
        """This rank's place among those that share its sequence."""
        return dist.get_rank() % self.degrees.context

    def context_channel(self, traffic: Traffic) -> Channel:
        """Return the channel of this rank's context group."""
        inner, outer = (Channel(group, traffic) if group else None for group in (self.inner, self.outer))
        return Channel(self.context, traffic, inner=inner, outer=outer)


def _replicated(degrees: Degrees, shape: dict[str, int]) -> dict[str, int]:
    return {"replicate": degrees.dp_replicate, **shape} if degrees.dp_replicate > 1 else shape
