"""Mesh: every rank's place on the axes dp_replicate x dp_shard x context, and the groups that follow from it.

Experts have axes of their own over the same ranks (folding, arXiv 2504.14960): dp_shard x context = expert_shard x
expert, neighbours hold different experts.
"""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from farspan.kernels.errors import ConfigError
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.ranks import share_timeout


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work.

    context: ranks that share one sequence.
    dp_shard: groups of ranks with sequences of their own that share one copy of the parameters; 0 takes what is left.
    dp_replicate: whole copies of the parameters (HSDP).
    expert: neighbouring ranks that share out the experts of a layer; a divisor of dp_shard x context.
    context_inner: of those, neighbours with fast links, such as the GPUs of a node; for strategies of two levels.
    strategy: how queries meet keys of other ranks, a file of parallel/context/; `auto` takes the fastest by the cost
    model and says why. inner_gbytes_per_s, outer_gbytes_per_s: what a rank sends in a second within its node and out of
    it, for `auto`; 0 takes what is usual.
    layout: which rank holds which tokens of a sequence: contiguous, zigzag, striped or balanced.
    timeout_s: how long a rank waits for others before it gives up; a rank that fails is noticed at once.
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
    timeout_s: int = field(default=600, metadata={"minimum": 1})


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mesh:
    """The process groups of this rank and its coordinates."""

    degrees: Degrees
    world: dist.ProcessGroup
    context: dist.ProcessGroup
    fsdp: DeviceMesh
    """Parameters are sharded over its last axis and, for HSDP, replicated over its first."""
    experts: DeviceMesh
    """Those of experts are dealt over its axis `expert`, sharded over `shard` and, for HSDP, replicated."""
    expert: dist.ProcessGroup
    data_rank: int
    context_rank: int
    inner: dist.ProcessGroup | None
    outer: dist.ProcessGroup | None
    """Axes of the context group, where it is a grid."""

    @staticmethod
    def build(config: ParallelConfig, device_type: str) -> "Mesh":
        """Build the mesh of the initialised default process group; every rank has to call it."""
        degrees = Degrees.resolve(config, dist.get_world_size())
        ranks = init_device_mesh(device_type, (degrees.data, degrees.context), mesh_dim_names=("data", "context"))
        if degrees.dp_replicate == 1:
            fsdp = init_device_mesh(device_type, (degrees.shard,), mesh_dim_names=("shard",))
        else:
            shape = (degrees.dp_replicate, degrees.shard)
            fsdp = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
        shape, names = (degrees.shard // degrees.expert, degrees.expert), ("shard", "expert")
        if degrees.dp_replicate > 1:
            shape, names = (degrees.dp_replicate, *shape), ("replicate", *names)
        experts = init_device_mesh(device_type, shape, mesh_dim_names=names)
        grid = None
        if config.context_inner > 1:
            shape = (degrees.data, degrees.context // config.context_inner, config.context_inner)
            grid = init_device_mesh(device_type, shape, mesh_dim_names=("data", "outer", "inner"))
        world = dist.group.WORLD
        assert world is not None
        for mesh in (ranks, fsdp, experts, *([grid] if grid else [])):
            for group in mesh.get_all_groups():
                share_timeout(world, group)
        return Mesh(
            degrees=degrees,
            world=world,
            context=ranks.get_group("context"),
            fsdp=fsdp,
            experts=experts,
            expert=experts.get_group("expert"),
            data_rank=ranks.get_local_rank("data"),
            context_rank=ranks.get_local_rank("context"),
            inner=grid.get_group("inner") if grid else None,
            outer=grid.get_group("outer") if grid else None,
        )

    def context_channel(self, traffic: Traffic) -> Channel:
        """Return the channel of this rank's context group."""
        inner, outer = (Channel(group, traffic) if group else None for group in (self.inner, self.outer))
        return Channel(self.context, traffic, inner=inner, outer=outer)
