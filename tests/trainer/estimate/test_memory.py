"""The memory estimate against tensors that exist, and against numbers worked out by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.errors import ConfigError
from farspan.kernels import recomputation
from farspan.kernels.kinds import routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Degrees, Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.estimate.memory import block_activations, check_memory, estimate_memory
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.optim import build_optimizer
from farspan.trainer.resolve import open_data
from farspan.trainer.toml_config import load_config
from farspan.trainer.validate import validate
from tests.support import tiny
from tests.support.rank_pool import Pools

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GIB = 2**30


@pytest.fixture
def config(base: Config) -> Config:
    return replace(base, train=replace(base.train, compute_dtype="float32"))


def saved_bytes(config: Config) -> int:
    """Bytes that autograd saves in one forward pass of the model, and selections of keys; without parameters."""
    with connected(Ranks(), torch.device("cpu")):
        builder = build_batches(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"), Traffic())
        data = PackedSequences(open_data(config)[0], sequence_tokens=config.data.sequence_tokens, seed=0)
        batch = builder.build(data.sequence(0))
    model = Transformer(config.model, builder.mechanisms, recompute=config.train.recompute == "block")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor, std=0.1)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def kept(choose: Callable[[], BlockSelection]) -> BlockSelection:
        selection = recomputation.kept(choose)
        for tensor in (selection.offsets, selection.key_blocks):
            save(tensor)
        return selection

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        mock.patch.object(routed, "kept", kept),
    ):
        losses = model(batch.tokens, batch.labels, batch.context).losses
    assert losses.requires_grad
    return sum(saved.values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    ("mechanism", "key_convolution", "experts"),
    [
        ("dense", 0, ExpertsConfig()),
        ("dense", 3, ExpertsConfig()),
        ("moba", 0, ExpertsConfig()),
        ("mosa", 0, ExpertsConfig()),
        ("dense", 0, ExpertsConfig(count=8, feed_forward=64, shared=192)),
        ("lightning", 3, ExpertsConfig()),
    ],
)
def test_activations_are_what_autograd_saves(
    config: Config, qk_norm: bool, recompute, mechanism: str, key_convolution: int, experts: ExpertsConfig
) -> None:
    # Wide enough that a scalar per token is small beside what is counted.
    config = tiny.with_model(
        config, width=128, head_dim=32, feed_forward=320, qk_norm=qk_norm, key_convolution=key_convolution,
        experts=experts, recurrent_layer="gated" if mechanism == "lightning" else "plain",
        kv_heads=4 if mechanism == "lightning" else 2,
    )  # fmt: skip
    config = replace(
        config,
        train=replace(config.train, recompute=recompute),
        # Under another strategy than `single` a recurrence keeps a state as well, small for longer sequences only.
        attention=replace(
            config.attention, mechanism=mechanism, options={"block": 4, "top_k": 2} if mechanism == "moba" else {}
        ),
    )
    few, many = tiny.with_model(config, layers=1), tiny.with_model(config, layers=4)
    degrees = Degrees.resolve(config.parallel, 1)
    saved = saved_bytes(many) - saved_bytes(few)
    estimated = estimate_memory(many, degrees).activations - estimate_memory(few, degrees).activations
    assert saved == pytest.approx(estimated, rel=0.02)
    if recompute == "none":
        # Zigzag has two chunks of 51 for 101 tokens.
        tokens, has_experts = 102, experts.count > 0
        block = block_activations(config, of := config.mechanisms()[0], has_experts, tokens=tokens)
        one_document = Rows.packed([config.data.sequence_tokens])
        choice = of.kept_bytes(config.model.heads_of(of), one_document, tokens=tokens, packed=False)
        assert estimated == 3 * (block + choice)


def test_with_recomputation_the_largest_block_counts_wherever_it_is(config: Config) -> None:
    config = replace(config, train=replace(config.train, recompute="block"))
    first, last = (
        tiny.with_model(config, experts=ExpertsConfig(count=8, feed_forward=64, shared=192, layers=layers))
        for layers in ("experts, dense", "dense, experts")
    )
    dense = estimate_memory(config, Degrees.resolve(config.parallel, 1)).activations
    found = [estimate_memory(one, Degrees.resolve(one.parallel, 1)).activations for one in (first, last)]
    assert found[0] == found[1] > dense


def state_bytes(config: Config) -> int:
    model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    optimizer = build_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [*model.parameters(), *(p.grad for p in model.parameters())]
    states += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.to_local().nbytes for tensor in states if isinstance(tensor, DTensor))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_states_are_those_of_the_ranks(config: Config, ranks: Pools, dtype) -> None:
    config = replace(config, parallel=ParallelConfig(context=2), train=replace(config.train, compute_dtype=dtype))
    states = ranks(2).run(state_bytes, config)
    assert sum(states) / 2 == estimate_memory(config, Degrees.resolve(config.parallel, 2)).states


def test_estimate_of_a_large_run() -> None:
    """Llama 3.1 8B on 8 GPUs, the parts worked out by hand in GiB."""
    config = load_config(Config, CONFIGS / "llama3_8b_128k.toml")
    memory = estimate_memory(config, Degrees.resolve(config.parallel, 8))
    tokens, head, block = 131072 // 8, 128256 * 4096, 218_112_000
    assert memory.states / GIB == pytest.approx(8_030_261_248 * 16 / 8 / GIB)
    assert memory.gathered / GIB == pytest.approx((3 * head + 3 * block) * 2 / GIB + block * 4 / GIB, rel=1e-3)
    per_token = 32 * 4096 * 2 + (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336) * 2 + 32 * 4 + 2 * 4096 * 2
    assert memory.activations / GIB == pytest.approx(tokens * per_token / GIB)
    # A chunk of logits within 1 GiB, and in 16 bits, the gradient of the hidden states, the head's gradient in float32.
    assert memory.working / GIB == pytest.approx((tokens * 4096 * 2 + head * 4) / GIB + 1.5, rel=0.01)


def test_estimate_of_a_hybrid_with_experts() -> None:
    """MiniMax-style on 8 GPUs, the parts worked out by hand in GiB."""
    config = load_config(Config, CONFIGS / "minimax_style.toml")
    memory = estimate_memory(config, Degrees.resolve(config.parallel, 8))
    tokens, width = 262144 // 8, 2048
    assert memory.states / GIB == pytest.approx(20_778_248_192 * 16 / 8 / GIB)
    # The residual stream before both norms, these and the norm of out; q, k, v twice, out, gate and their product; two
    # rows to experts and two back; three numbers for each expert in float32.
    block = (2 + 2 + 1 + 6 + 3 + 2 * 2) * width * 2 + 3 * 32 * 4
    assert memory.activations / GIB == pytest.approx(tokens * (32 * width * 2 + block + 2 * width * 2) / GIB)
    assert memory.working / GIB == pytest.approx((tokens * width * 2 + 200064 * width * 4) / GIB + 1.5, rel=0.01)
    # Without the loss and SwiGLU, backward of a gated layer: out and q; q, k and v, 16 heads of each, in float32.
    thin = ExpertsConfig(count=32, per_token=2, feed_forward=64)
    small = tiny.with_model(config, vocabulary_size=64, feed_forward=64, experts=thin)
    assert estimate_memory(small, Degrees.resolve(small.parallel, 8)).working == tokens * width * (2 * 2 + 3 * 4)


# Ranks as suggested in the files; the rest of 80 GB is for torch, NCCL and uneven loads of experts.
@pytest.mark.parametrize(
    ("preset", "ranks", "gib"),
    [("qwen3_30b_a3b_128k", 64, 17), ("qwen3_30b_a3b_128k", 16, 39), ("mixtral_8x7b_64k", 32, 33),
     ("mixtral_8x7b_64k", 16, 55), ("minimax_style", 8, 52)],
)  # fmt: skip
def test_presets_fit_their_gpus(preset: str, ranks: int, gib: int) -> None:
    config = load_config(Config, CONFIGS / f"{preset}.toml")
    degrees = Degrees.resolve(config.parallel, ranks)
    validate(config, degrees)
    assert estimate_memory(config, degrees).total / GIB == pytest.approx(gib, abs=1)


def test_a_run_that_cannot_fit_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    degrees, cpu = Degrees.resolve(config.parallel, 1), torch.device("cpu")
    needed = estimate_memory(config, degrees).total
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed}.__getitem__)
    check_memory(config, degrees, cpu, local_rank=0)
    # The second rank of the machine leaves half of it to the first.
    with pytest.raises(ConfigError, match=r"data\.sequence_tokens=101 takes .* a rank .*parallel\.context"):
        check_memory(config, degrees, cpu, local_rank=1)
