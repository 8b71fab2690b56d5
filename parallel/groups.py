"""Process groups along the axes of a mesh: made once for each purpose and set of ranks.

Purposes do not share groups: on a GPU what is sent over one group is sent in turns, and parameters that are gathered in
advance would hold up the keys of a ring. On CPUs each group has a thread that polls to the end of the process.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from farspan.parallel.ranks import share_timeout

_MADE: dict[tuple[dist.ProcessGroup, str, tuple[int, ...]], object] = {}
"""By world, purpose and ranks; of groups that this rank is not in, what torch gives for them."""


def group_along(purpose: str, shape: Mapping[str, int], axis: str, backend: str | None = None) -> dist.ProcessGroup:
    """Return this rank's group along one axis of a grid of all ranks, the last axis the innermost.

    backend: the world's, if left out. Every rank has to call it. A group waits for its ranks no longer than the world
    does.
    """
    world, me = dist.group.WORLD, dist.get_rank()
    assert world is not None
    for key in [key for key in _MADE if key[0] is not world]:
        # Of a world that is no more, whose groups would live on.
        del _MADE[key]
    lines = torch.arange(dist.get_world_size()).view(*shape.values()).movedim(list(shape).index(axis), -1)
    mine = None
    for ranks in map(tuple, lines.flatten(0, -2).tolist() if len(shape) > 1 else [lines.tolist()]):
        if (world, purpose, ranks) not in _MADE:
            _MADE[world, purpose, ranks] = dist.new_group(ranks, backend=backend)
        if me in ranks:
            mine = _MADE[world, purpose, ranks]
    assert isinstance(mine, dist.ProcessGroup)
    share_timeout(world, mine)
    return mine


def device_mesh(purpose: str, shape: Mapping[str, int], device_type: str) -> DeviceMesh:
    """Return the grid of all ranks with a group along each axis; every rank has to call it."""
    groups = [group_along(f"{purpose} {axis}", shape, axis) for axis in shape]
    ranks = torch.arange(dist.get_world_size()).view(*shape.values())
    return DeviceMesh.from_group(
        groups if len(groups) > 1 else groups[0], device_type, mesh=ranks, mesh_dim_names=tuple(shape)
    )
