"""Mesh: the coordinates of each rank on the axes dp_replicate x dp_shard x context, and its process groups.

Experts have axes of their own over the same ranks (folding, arXiv 2504.14960): dp_shard x context = expert_shard x
expert. Example: 8 ranks, dp_replicate 2, dp_shard 2, context 2, expert 2; the last axis varies fastest.

    rank           0 1 2 3 4 5 6 7
    dp_replicate   0 0 0 0 1 1 1 1     copies of the parameters
    dp_shard       0 0 1 1 0 0 1 1     sequences that share one copy
    context        0 1 0 1 0 1 0 1     ranks 0 and 1 share a sequence
    fsdp shard     0 1 2 3 0 1 2 3     parameters are sharded over dp_shard x context
    expert         0 1 0 1 0 1 0 1     neighbors hold different experts
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from farspan.errors import ConfigError
from farspan.parallel.comm import Channel, GradCommDtype, Traffic
from farspan.parallel.ranks import share_timeout

_GROUPS: dict[tuple[dist.ProcessGroup, str, tuple[int, ...]], object] = {}
"""Groups by world, purpose and ranks; for groups without this rank, torch's placeholder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work."""

    context: int = field(default=1, metadata={"minimum": 1})
    """Ranks that share one sequence."""

    dp_shard: int = field(default=0, metadata={"minimum": 0})
    """Groups of ranks that train on sequences of their own and share one copy of the parameters; 0 uses all ranks that
    the other degrees leave."""

    dp_replicate: int = field(default=1, metadata={"minimum": 1})
    """Full copies of the parameters (HSDP)."""

    expert: int = field(default=1, metadata={"minimum": 1})
    """Neighboring ranks that split the experts of a layer; a divisor of dp_shard x context."""

    context_inner: int = field(default=1, metadata={"minimum": 1})
    """Neighboring ranks with fast links among those of `context`, such as the GPUs of a node; for strategies of two
    levels."""

    strategy: str = "ring"
    """How queries meet the keys of other ranks, see parallel/context_parallel/strategies; `auto` takes the
    fastest by the cost model and logs why."""

    layout: str = "zigzag"
    """Which rank holds which tokens of a sequence: contiguous, zigzag, striped or balanced."""

    grad_comm_dtype: GradCommDtype = "accumulation"
    """Dtype in which gradients of keys and values travel between ranks: `accumulation`, float32 for bfloat16, or
    `compute`, the dtype of the keys, in half the bytes; both are summed in float32."""

    inner_gbytes_per_s: float = field(default=0.0, metadata={"minimum": 0})
    """Bandwidth of a rank within its node, for `auto`; 0 takes a typical value."""

    outer_gbytes_per_s: float = field(default=0.0, metadata={"minimum": 0})
    """Bandwidth of a rank between nodes, for `auto`; 0 takes a typical value."""

    timeout_s: int = field(default=1800, metadata={"minimum": 1})
    """How long a rank waits for other ranks before it gives up; a rank that fails is noticed at once, and shorter
    limits of [watchdog] act first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Sizes of the axes; the product of the first three is the number of ranks."""

    dp_replicate: int
    dp_shard: int
    context: int
    expert: int = 1

    @property
    def data(self) -> int:
        """Sequences that are trained on at the same time."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the parameters: FSDP shards over the context axis too."""
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
    """The process groups of this rank.

    fsdp: parameters are sharded over its last axis and, for HSDP, replicated over its first. inner, outer: axes of the
    context group, where it is a grid of node groups. gradients: a second group of the ranks of `context`, for rings on
    such a grid.
    """

    degrees: Degrees
    device_type: str
    context: dist.ProcessGroup
    fsdp: DeviceMesh
    inner: dist.ProcessGroup | None
    outer: dist.ProcessGroup | None
    gradients: dist.ProcessGroup | None

    @staticmethod
    def build(config: ParallelConfig, device_type: str) -> "Mesh":
        """Build the mesh of the initialized default process group; every rank has to call it."""
        degrees = Degrees.resolve(config, dist.get_world_size())
        inner_size = config.context_inner
        by_context = {"data": degrees.data, "context": degrees.context}
        grid = {"data": degrees.data, "outer": degrees.context // inner_size, "inner": inner_size}
        return Mesh(
            degrees=degrees,
            device_type=device_type,
            context=group_along("context", by_context, "context"),
            fsdp=device_mesh("parameters", _replicated(degrees, {"shard": degrees.shard}), device_type),
            inner=group_along("inner", grid, "inner") if inner_size > 1 else None,
            outer=group_along("outer", grid, "outer") if inner_size > 1 else None,
            gradients=group_along("gradients", by_context, "context") if inner_size > 1 else None,
        )

    @cached_property
    def experts(self) -> DeviceMesh:
        """The mesh of expert parameters: split over axis `expert`, sharded over `shard` and, for HSDP, replicated.

        The first access creates its groups, so every rank has to make it.
        """
        shape = {"shard": self.degrees.shard // self.degrees.expert, "expert": self.degrees.expert}
        return device_mesh("experts", _replicated(self.degrees, shape), self.device_type)

    @property
    def expert(self) -> dist.ProcessGroup:
        """The ranks that hold all experts between them."""
        return self.experts.get_group("expert")

    @property
    def data_rank(self) -> int:
        """The index of this rank's context group among all of them."""
        return dist.get_rank() // self.degrees.context

    def context_channel(self, traffic: Traffic) -> Channel:
        groups = self.inner, self.outer, self.gradients
        inner, outer, gradients = (Channel(group, traffic) if group else None for group in groups)
        return Channel(self.context, traffic, inner=inner, outer=outer, gradients=gradients)


def _replicated(degrees: Degrees, shape: dict[str, int]) -> dict[str, int]:
    return {"replicate": degrees.dp_replicate, **shape} if degrees.dp_replicate > 1 else shape


def group_along(purpose: str, shape: Mapping[str, int], axis: str, backend: str | None = None) -> dist.ProcessGroup:
    """Return this rank's group along one axis of a grid of all ranks, the last axis the innermost.

    Groups are created once for each purpose and set of ranks, and time out no later than the world. backend: the
    world's, if left out. Every rank has to call it.
    """
    # Purposes do not share groups: a GPU runs the transfers of one group in order, and parameters gathered in advance
    # would delay the keys of a ring. Nor is a group created twice: on CPUs each has a thread that polls until exit.
    world, global_rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    for key in [key for key in _GROUPS if key[0] is not world]:
        # Groups of a destroyed world would stay referenced.
        del _GROUPS[key]
    ranks_of_groups = torch.arange(dist.get_world_size()).view(*shape.values())  # [ranks] -> one dimension per axis
    ranks_of_groups = ranks_of_groups.movedim(list(shape).index(axis), -1).reshape(-1, shape[axis])  # [groups, ranks]
    own = None
    for ranks in map(tuple, ranks_of_groups.tolist()):
        if (world, purpose, ranks) not in _GROUPS:
            _GROUPS[world, purpose, ranks] = dist.new_group(ranks, backend=backend)
        if global_rank in ranks:
            own = _GROUPS[world, purpose, ranks]
    assert isinstance(own, dist.ProcessGroup)
    share_timeout(world, own)
    return own


def device_mesh(purpose: str, shape: Mapping[str, int], device_type: str) -> DeviceMesh:
    """Return the grid of all ranks with a group along each axis; every rank has to call it."""
    groups = [group_along(f"{purpose} {axis}", shape, axis) for axis in shape]
    ranks = torch.arange(dist.get_world_size()).view(*shape.values())  # [ranks] -> one dimension per axis
    return DeviceMesh.from_group(
        groups if len(groups) > 1 else groups[0], device_type, mesh=ranks, mesh_dim_names=tuple(shape)
    )
