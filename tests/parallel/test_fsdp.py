from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_leaves

from farspan.parallel.comm import Traffic
from farspan.parallel.fsdp import clip_gradients, sharding_bytes
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.batch import MicroBatch
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.model.attention import Attention
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resolve import open_data
from tests.support import tiny
from tests.support.collectives import SentBytes
from tests.support.rank_pool import RankPool


def model_and_batch(config: Config) -> tuple[Transformer, MicroBatch, Mesh]:
    """On a rank: the sharded model and its part of the first sequence."""
    mesh, device = Mesh.build(config.parallel, "cpu"), torch.device("cpu")
    data = PackedSequences(open_data(config)[0], sequence_tokens=config.data.sequence_tokens, seed=0)
    batch = build_batches(config, mesh, device, Traffic()).build(data.sequence(0))
    return build_model(config, mesh, device), batch, mesh


def count_sharding(config: Config) -> tuple[int, int, dict[tuple[str, int], int]]:
    model, batch, mesh = model_and_batch(config)
    with SentBytes() as counter:
        with torch.no_grad():
            model(batch.tokens, batch.labels, batch.context)
        for _ in range(2):
            # Statistics of routers have gradients too, which come in the backward pass of their block.
            outputs = tree_leaves(model(batch.tokens, batch.labels, batch.context))
            torch.stack([output.sum() for output in outputs if output.requires_grad]).sum().backward()
    of_sharding = {
        "_allgather_base_",
        "_reduce_scatter_base_",
        *(["allreduce_"] if mesh.degrees.dp_replicate > 1 else []),
    }
    sent = round(sum(size for (name, _), size in counter.sent.items() if name in of_sharding))
    stated = sharding_bytes(model, model.blocks, mesh, torch.float32, micro_batches=2, passes_ahead=1)
    return stated, sent, dict(counter.sent)


@pytest.mark.parametrize(
    "parallel",
    # Ulysses, as ring all-reduces routing, which would be counted too. Three ranks: no parameter has rows that they
    # divide.
    [
        ParallelConfig(context=2),
        ParallelConfig(context=2, dp_replicate=2, strategy="ulysses"),
        ParallelConfig(context=3),
        ParallelConfig(context=2, expert=2),
        ParallelConfig(context=4, expert=2, strategy="ulysses"),
        ParallelConfig(context=2, dp_replicate=2, expert=2, strategy="ulysses"),
    ],
    ids=str,
)
def test_bytes_of_sharding_are_as_stated(
    tmp_path: Path, ranks: Callable[[int], RankPool], parallel: ParallelConfig
) -> None:
    # With every kind of parameter there is: a router's has fewer rows than there may be ranks.
    config = tiny.with_model(tiny.config(tiny.make_data(tmp_path), tmp_path, parallel), key_convolution=3)
    if parallel.context % 3:
        # Two blocks with experts in a row where parameters have replicas, else one of each kind.
        layers = "experts" if parallel.dp_replicate > 1 else "experts, dense"
        config = tiny.with_model(config, experts=ExpertsConfig(count=4, feed_forward=24, layers=layers))
    config = replace(
        config,
        train=replace(config.train, compute_dtype="float32"),
        attention=replace(config.attention, mechanism="mosa"),
    )
    for stated, counted, sent in ranks(parallel.context * parallel.dp_replicate).run(count_sharding, config):
        assert stated == counted, sent


def gathers_before_blocks(config: Config) -> list[tuple[int, int]]:
    """Return the number of each block as it begins, forward and recomputed, and how many all-gathers had begun."""
    model, batch, _ = model_and_batch(config)
    found = []
    with SentBytes() as counter:
        for number, block in enumerate(model.blocks):
            block.attention.register_forward_pre_hook(  # pyright: ignore
                lambda *_, number=number: found.append((number, counter.calls["_allgather_base_"]))
            )
        model(batch.tokens, batch.labels, batch.context).losses.sum().backward()
    return found


def test_a_block_and_its_experts_are_gathered_while_the_one_before_computes(
    tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    config = tiny.config(tiny.make_data(tmp_path), tmp_path, ParallelConfig(context=2))
    experts = ExpertsConfig(count=4, feed_forward=24, layers="experts, dense, experts")
    config = tiny.with_model(config, layers=3, experts=experts)
    config = replace(config, train=replace(config.train, recompute="block"))
    for found in ranks(2).run(gathers_before_blocks, config):
        # Forward: the model's own, block 0 and its experts, block 1; then block 2 and its experts; then nothing.
        # Backward: blocks 2 and 1; the experts of 2 when it gets to them; block 0 and its experts.
        assert found == [(0, 4), (1, 6), (2, 6), (2, 8), (1, 11), (0, 11)]


def dtypes_under_bfloat16(config: Config) -> tuple[set[torch.dtype], set[torch.dtype], float]:
    """Return the dtypes that rotary tables and weights have in a block, and the share of gradients beyond bfloat16."""
    model, batch, _ = model_and_batch(config)
    tables, weights = set(), set()

    def look(module: Attention, args: tuple[Any, ...]) -> None:
        tables.add(args[1].cos.dtype)
        weights.add(module.query.weight.dtype)

    for block in model.blocks:
        block.attention.register_forward_pre_hook(look)  # pyright: ignore
    model(batch.tokens, batch.labels, batch.context).losses.sum().backward()
    gradients = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])  # pyright: ignore
    beyond = gradients != gradients.bfloat16().float()
    return tables, weights, beyond[gradients != 0].float().mean().item()


def test_bfloat16_is_for_products_only(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    """Rotary tables stay float32, and so do gradients on their way between ranks."""
    config = tiny.config(tiny.make_data(tmp_path), tmp_path, ParallelConfig(context=2))
    config = replace(config, train=replace(config.train, compute_dtype="bfloat16"))
    for tables, weights, beyond in ranks(2).run(dtypes_under_bfloat16, config):
        assert tables == {torch.float32}
        assert weights == {torch.bfloat16}
        assert beyond > 0.3


def clip_known_gradients(parallel: ParallelConfig, max_norm: float) -> tuple[float, float, float]:
    """Gradients whose norm is known: element i of all parameters set end to end has gradient i."""
    config = tiny.config(Path("none"), Path("none"), parallel)
    config = tiny.with_model(config, experts=ExpertsConfig(count=4, feed_forward=24, layers="experts, dense"))
    mesh = Mesh.build(parallel, "cpu")
    model = build_model(config, mesh, torch.device("cpu"))
    first = 0
    for parameter in model.parameters():
        gradient = torch.arange(first, first + parameter.numel(), dtype=torch.float64).view(parameter.shape)
        of_parameter = parameter.device_mesh, parameter.placements  # pyright: ignore
        parameter.grad = distribute_tensor(gradient, *of_parameter)
        first += parameter.numel()
    norm = clip_gradients(model.parameters(), max_norm).item()
    squares = [p.grad.full_tensor().square().sum().item() for p in model.parameters()]  # pyright: ignore
    n = first - 1
    return norm, sum(squares) ** 0.5, (n * (n + 1) * (2 * n + 1) / 6) ** 0.5


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(context=2),
        ParallelConfig(dp_replicate=2),
        ParallelConfig(context=2, expert=2),
        ParallelConfig(dp_replicate=2, expert=2),
    ],
    ids=str,
)
def test_clipping_is_exact_over_the_mesh(ranks: Callable[[int], RankPool], parallel: ParallelConfig) -> None:
    for norm, clipped, expected in ranks(4).run(clip_known_gradients, parallel, 2.5):
        assert norm == pytest.approx(expected, rel=1e-12)
        assert clipped == pytest.approx(2.5, rel=1e-12)
    for norm, clipped, expected in ranks(4).run(clip_known_gradients, parallel, 1e30):
        assert [norm, clipped] == pytest.approx([expected] * 2, rel=1e-12)


def clip_infinite() -> tuple[float, bool]:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, torch.inf if dist.get_rank() == 0 else 2.0, 3.0])
    norm = clip_gradients([parameter], 1.0).item()
    return norm, bool(parameter.grad[0] == 1.0)


def test_a_norm_that_is_not_finite_leaves_the_gradients_unchanged(ranks: Callable[[int], RankPool]) -> None:
    norm, untouched = ranks(1).run(clip_infinite)[0]
    assert norm == torch.inf
    assert untouched
