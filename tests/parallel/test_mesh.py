import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from farspan.errors import ConfigError
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Degrees, Mesh, ParallelConfig
from tests.support.rank_pool import COLLECTIVE_TIMEOUT_S, RankPool


@pytest.mark.parametrize(
    ("config", "num_ranks", "expected"),
    [
        (ParallelConfig(), 1, (1, 1, 1)),
        (ParallelConfig(context=4), 8, (1, 2, 4)),
        (ParallelConfig(context=2, dp_replicate=2), 8, (2, 2, 2)),
        (ParallelConfig(context=2, dp_replicate=2, dp_shard=2), 8, (2, 2, 2)),
    ],
)
def test_degrees_fill_the_ranks(config: ParallelConfig, num_ranks: int, expected: tuple[int, ...]) -> None:
    degrees = Degrees.resolve(config, num_ranks)
    assert (degrees.dp_replicate, degrees.dp_shard, degrees.context) == expected


@pytest.mark.parametrize(
    ("config", "num_ranks", "message"),
    [
        (ParallelConfig(context=3), 8, r"parallel\.context=3 x parallel\.dp_replicate=1 = 3 must divide .* ranks, 8"),
        (ParallelConfig(dp_shard=2), 8, r"x parallel\.dp_shard=2 = 2 must equal the number of ranks, 8"),
        (ParallelConfig(context=16), 8, r"= 16 must divide the number of ranks, 8"),
        (ParallelConfig(context=2, dp_replicate=2, expert=3), 8, r"expert=3 must divide .* = 2 x 2, the ranks"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(config: ParallelConfig, num_ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degrees.resolve(config, num_ranks)


def places(config: ParallelConfig) -> tuple[int, list[int], tuple[str, ...] | None, list[list[int]]]:
    """On a rank: its data rank, the ranks of its context group, and the names and ranks of the mesh of parameters."""
    mesh = Mesh.build(config, "cpu")
    return mesh.data_rank, dist.get_process_group_ranks(mesh.context), mesh.fsdp.mesh_dim_names, mesh.fsdp.mesh.tolist()


def test_context_groups_are_neighbors_and_parameters_are_sharded_over_all(ranks: Callable[[int], RankPool]) -> None:
    found = ranks(4).run(places, ParallelConfig(context=2))
    assert [place[:2] for place in found] == [(0, [0, 1]), (0, [0, 1]), (1, [2, 3]), (1, [2, 3])]
    assert all(place[2:] == (("shard",), [0, 1, 2, 3]) for place in found)


@pytest.mark.parametrize(("degree", "dp_shard"), [(4, 0), (8, 2)])
def test_replicas_lie_far_apart_and_shard_their_own_copy(
    ranks: Callable[[int], RankPool], degree: int, dp_shard: int
) -> None:
    rows = torch.arange(degree).view(2, -1).tolist()
    for place in ranks(degree).run(places, ParallelConfig(context=2, dp_replicate=2, dp_shard=dp_shard)):
        assert place[2:] == (("replicate", "shard"), rows)


def timeouts() -> set[float]:
    mesh = Mesh.build(ParallelConfig(context=2, dp_replicate=2), "cpu")
    groups = [mesh.context, *mesh.fsdp.get_all_groups(), *mesh.experts.get_all_groups()]
    return {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups}


def test_no_group_waits_longer_than_the_world(ranks: Callable[[int], RankPool]) -> None:
    """torch gives every new group half an hour."""
    assert ranks(4).run(timeouts) == [{COLLECTIVE_TIMEOUT_S}] * 4


def made_twice() -> bool:
    config = ParallelConfig(context=2, context_inner=2, expert=2)
    one, other = (Mesh.build(config, "cpu") for _ in range(2))
    assert one.context is other.context
    assert one.inner is other.inner
    pairs = zip(one.experts.get_all_groups(), other.experts.get_all_groups(), strict=True)
    assert all(a is b for a, b in pairs)
    assert one.fsdp.get_group() is other.fsdp.get_group()
    of_all = Mesh.build(ParallelConfig(context=4), "cpu")
    for mesh, experts in ((one, one.expert), (of_all, of_all.experts.get_group("shard"))):
        assert len({id(group) for group in (mesh.context, mesh.fsdp.get_group(), experts)}) == 3
    return True


def test_groups_are_made_once_for_each_purpose(ranks: Callable[[int], RankPool]) -> None:
    assert all(ranks(4).run(made_twice))


def lines() -> list[list[int]]:
    mesh = Mesh.build(ParallelConfig(context=4, context_inner=2, expert=2), "cpu")
    assert mesh.inner is not None
    assert mesh.outer is not None
    groups = [mesh.inner, mesh.outer, mesh.expert, mesh.experts.get_group("shard")]
    return [dist.get_process_group_ranks(group) for group in groups]


def test_ranks_of_an_inner_axis_and_those_that_hold_all_experts_are_neighbors(
    ranks: Callable[[int], RankPool],
) -> None:
    near, far = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert ranks(4).run(lines) == [[*axes] for axes in zip(near, far, near, far, strict=True)]


@pytest.mark.parametrize(
    ("replicas", "data", "outer", "inner", "expert"),
    [(2, 3, 2, 4, 2), (2, 3, 2, 4, 12), (1, 2, 3, 4, 3), (2, 2, 4, 3, 8), (3, 2, 2, 2, 4)],
)
def test_groups_of_all_axes_at_once(replicas: int, data: int, outer: int, inner: int, expert: int) -> None:
    """Whoever shares all coordinates but one with a rank is in its group: axes of different lengths, on every rank."""
    shape = {"replicate": replicas, "data": data, "outer": outer, "inner": inner}
    places = [*itertools.product(*map(range, shape.values()))]
    shard_size = data * outer * inner
    config = ParallelConfig(dp_replicate=replicas, context=outer * inner, context_inner=inner, expert=expert)
    for rank, place in enumerate(places):
        dist.init_process_group("fake", rank=rank, world_size=len(places), store=FakeStore())
        try:
            mesh = Mesh.build(config, "cpu")
            channel = mesh.context_channel(Traffic())
            assert channel.inner is not None
            assert channel.outer is not None
            found = {
                "context": channel.group,
                "inner": channel.inner.group,
                "outer": channel.outer.group,
                "gradients": channel.gradients.group,
                "shard": mesh.fsdp.get_group("shard"),
                "expert": mesh.expert,
                "same experts": mesh.experts.get_group("shard"),
            }
            if replicas > 1:
                found["replicas"] = mesh.fsdp.get_group("replicate")
                found["replicas of experts"] = mesh.experts.get_group("replicate")
            found = {name: dist.get_process_group_ranks(group) for name, group in found.items()}
            assert mesh.data_rank == place[0] * data + place[1]
            assert channel.rank == channel.outer.rank * inner + channel.inner.rank == place[2] * inner + place[3]
        finally:
            dist.destroy_process_group()

        def others(*free: int, place: tuple[int, ...] = place) -> list[int]:
            """The ranks that differ from this one along some axes only."""
            same = [axis for axis in range(4) if axis not in free]
            return [r for r, other in enumerate(places) if all(other[axis] == place[axis] for axis in same)]

        start, nth = rank - rank % shard_size, rank % shard_size
        expected = {
            "context": others(2, 3),
            "inner": others(3),
            "outer": others(2),
            "gradients": others(2, 3),
            "shard": others(1, 2, 3),
            "expert": [start + nth - nth % expert + n for n in range(expert)],
            "same experts": [start + n for n in range(nth % expert, shard_size, expert)],
        }
        if replicas > 1:
            expected |= {"replicas": others(0), "replicas of experts": others(0)}
        assert found == expected
