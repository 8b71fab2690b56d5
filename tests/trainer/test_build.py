from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.build import build_batches, build_model, build_on_meta
from farspan.trainer.config import Config
from farspan.trainer.model.flops import total_parameters
from tests.support import tiny
from tests.support.rank_pool import Pools

Shards = dict[str, tuple[int, str, str]]


def built(config: Config, on_meta: bool) -> tuple[Shards, bool, bool]:
    """On each rank: size, dtype and device of its shards; whether tied parameters are one; whether all are finite."""
    mesh = Mesh.build(config.parallel, "cpu")
    model = build_on_meta(config, mesh) if on_meta else build_model(config, mesh, torch.device("cpu"))
    shards: Shards = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        shards[name] = (local.numel(), str(local.dtype), local.device.type)
    tied = model.head.weight is model.embedding.weight
    # Memory that nobody has initialized is NaN in tests.
    finite = on_meta or all(p.to_local().isfinite().all() for p in model.parameters() if isinstance(p, DTensor))
    return shards, tied, bool(finite)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny.config(tmp_path, tmp_path, ParallelConfig(context=2))


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_share_the_parameters(config: Config, ranks: Pools, on_meta: bool, tied: bool) -> None:
    config = tiny.with_model(config, tied_embeddings=tied)
    sides = ranks(2).run(built, config, on_meta)
    total = sum(size for shards, _, _ in sides for size, _, _ in shards.values())
    assert total == total_parameters(config.model, config.mechanisms())
    for shards, is_tied, finite in sides:
        assert sum(size for size, _, _ in shards.values()) < 0.6 * total
        assert {device for _, _, device in shards.values()} == {"meta" if on_meta else "cpu"}
        assert is_tied == tied
        assert finite


@pytest.mark.parametrize(
    ("compute", "master"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")]
)
def test_master_parameters_are_never_rounded(config: Config, ranks: Pools, compute, master: str) -> None:
    config = replace(config, train=replace(config.train, compute_dtype=compute))
    for shards, _, _ in ranks(2).run(built, config, False):
        assert {dtype for _, dtype, _ in shards.values()} == {f"torch.{master}"}


def builder(config: Config) -> tuple[object, ...]:
    made = build_batches(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"), Traffic())
    layer, *others = made.layers
    assert all(other == layer for other in others)
    channel = layer.strategy.channel
    of_strategy = type(layer.strategy).__name__, layer.strategy.grad_comm_dtype, channel.size, channel.rank
    return *of_strategy, str(layer.mechanism), made.layout, layer.backend


def test_batches_follow_the_configuration(config: Config, ranks: Pools) -> None:
    ulysses = replace(
        config,
        parallel=ParallelConfig(context=2, strategy="ulysses", layout="striped", grad_comm_dtype="compute"),
        attention=replace(config.attention, options={"causal": False}, backend="reference"),
    )
    expected = "Dense(causal=False)", "striped", "reference"
    assert ranks(2).run(builder, ulysses) == [("Ulysses", "compute", 2, rank, *expected) for rank in range(2)]
    apart = replace(config, parallel=ParallelConfig(dp_shard=2))
    expected = "Ring", "accumulation", 1, 0, "Dense(causal=True)", "zigzag", "cpu"
    assert ranks(2).run(builder, apart) == [expected] * 2
