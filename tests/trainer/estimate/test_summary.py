"""What is printed of a run: the memory estimate against tensors that exist, the rest against known numbers."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Degrees, Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.config import AttentionConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.estimate import summary as describe_module
from farspan.trainer.estimate.summary import (
    GIB,
    attention_bytes,
    block_activations,
    convolution_bytes,
    describe,
    estimate_memory,
    format_layers,
)
from farspan.trainer.model.config import ExpertsConfig, ModelConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.optim import build_optimizer
from farspan.trainer.resolve import fill_in, open_data
from farspan.trainer.toml_config import load_config
from farspan.trainer.validate import validate
from tests.support import tiny
from tests.support.rank_pool import RankPool

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = tiny.config(tiny.make_data(tmp_path), tmp_path, ParallelConfig())
    return replace(config, train=replace(config.train, compute_dtype="float32"))


def saved_bytes(config: Config) -> int:
    """Bytes that autograd keeps for the backward pass of a whole forward pass, parameters left out."""
    with connected(Ranks(), torch.device("cpu")):
        builder = build_batches(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"), Traffic())
        data = PackedSequences(open_data(config)[0], sequence_tokens=config.data.sequence_tokens, seed=0)
        batch = builder.build(data.sequence(0))
    model = Transformer(config.model, builder.mechanisms, recompute=config.train.recompute == "block")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor, std=0.1)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch.tokens, batch.labels, batch.context).losses
    assert losses.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(
    ("mechanism", "key_convolution", "experts"),
    [
        ("dense", 0, ExpertsConfig()),
        ("dense", 3, ExpertsConfig()),
        ("mosa", 0, ExpertsConfig()),
        ("dense", 0, ExpertsConfig(count=8, feed_forward=64, shared=192)),
        ("lightning", 3, ExpertsConfig()),
    ],
)
def test_activations_are_what_autograd_keeps(
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
        attention=replace(config.attention, mechanism=mechanism),
        # Under another strategy a recurrence keeps a state as well, which is small for longer sequences only.
        parallel=ParallelConfig(strategy="single"),
    )
    few, many = tiny.with_model(config, layers=1), tiny.with_model(config, layers=4)
    degrees = Degrees.resolve(config.parallel, 1)
    kept = saved_bytes(many) - saved_bytes(few)
    estimated = estimate_memory(many, degrees).activations - estimate_memory(few, degrees).activations
    assert kept == pytest.approx(estimated, rel=0.02)
    if recompute == "none":
        tokens, has_experts = config.data.sequence_tokens, experts.count > 0
        assert estimated == 3 * block_activations(config, config.mechanisms()[0], has_experts, tokens=tokens)


def state_bytes(config: Config) -> int:
    model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    optimizer = build_optimizer(model, config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    held += [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.to_local().nbytes for tensor in held if isinstance(tensor, DTensor))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_states_are_what_ranks_hold(config: Config, ranks: Callable[[int], RankPool], dtype) -> None:
    config = replace(config, parallel=ParallelConfig(context=2), train=replace(config.train, compute_dtype=dtype))
    held = ranks(2).run(state_bytes, config)
    assert sum(held) / 2 == estimate_memory(config, Degrees.resolve(config.parallel, 2)).states


def test_lines(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(folder=tmp_path),
        model=ModelConfig(layers=4, width=256, heads=8, kv_heads=2, head_dim=32, feed_forward=768, qk_norm=True),
        data=DataConfig(folder=tmp_path, sequence_tokens=4096),
        train=TrainConfig(steps=100, sequences_per_step=6, compute_dtype="float32"),
        parallel=ParallelConfig(context=2),
    )
    degrees = Degrees.resolve(config.parallel, 4)
    lines = describe(fill_in(config, degrees, torch.device("cpu"), 257), degrees).splitlines()
    # A layer has (2 + 2 / 4) 256^2 + 3 * 256 * 768 parameters in matrices and 2 * 256 + 2 * 32 in norms; 256 more in
    # the last norm, and two tables of 320 * 256: 3,181,056. All but norms and one table, 3,096,576, are multiplied.
    # 6 * 3,096,576 FLOPs a token, and 12 * 4 layers * 256 features for each of 4097 / 2 visible keys: 43.75 million.
    # Ring of 2: keys and values of 2048 tokens, 2 * 2 * 32 features, 4 bytes; once forward, three times backward.
    assert lines[:6] == [
        "ranks       4 = dp_replicate 1 x dp_shard 2 x context 2",
        "step        24,576 tokens = 6 x 4,096; each rank holds 2,048 at a time and accumulates 3",
        "model       3,181,056 parameters; 4 layers, width 256, 8:2 heads of 32, vocabulary 320",
        "compute     0.0438 GFLOP per token, a document filling the sequence; float32 on cpu",
        "attention   Dense(causal=True), computed by cpu",
        "context     ring, zigzag; each rank sends 16.0 MiB per sequence",
    ]
    assert lines[6].startswith("memory      0.")
    assert len(lines) == 7


def test_what_travels_of_gathered_attention(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig(folder=tmp_path),
        model=ModelConfig(layers=4, width=256, heads=8, kv_heads=2, head_dim=32, feed_forward=768),
        data=DataConfig(folder=tmp_path, sequence_tokens=4096),
        train=TrainConfig(steps=1, compute_dtype="float32"),
        attention=AttentionConfig(mechanism="mosa", options={"sparsity": 16}),
        parallel=ParallelConfig(context=2),
    )
    degrees = Degrees.resolve(config.parallel, 2)
    lines = describe(fill_in(config, degrees, torch.device("cpu"), 257), degrees)
    # 4096 / 16 tokens for each of 2 KV heads, 256 on each of 2 ranks if evenly spread; a row is one head's: keys and
    # values of 32 features in 4 bytes, 64 KiB, once forward and three times backward; 4096 x 2 numbers of routing in 4
    # bytes, summed over both, 32 KiB; in each of 4 layers. Zigzag ranks hold the middle and both ends of documents, and
    # what is drawn is spread a little unevenly.
    assert "each rank holds 2,048 at a time" in lines
    sent = float(re.search(r"each rank sends ([\d.]+) MiB per sequence", lines)[1])  # pyright: ignore
    assert sent == pytest.approx(4 * (4 * 64 + 32) / 1024, rel=0.1)
    # As many parameters as without a router, and 2 x 256 in each layer.
    assert f"{3_181_056 - 4 * 2 * 32 + 4 * 2 * 256:,} parameters" in lines
    # Ulysses moves half of all tokens' q, k, v, out and routing, forward and backward.
    ulysses = replace(config, parallel=ParallelConfig(context=2, strategy="ulysses"))
    assert attention_bytes(ulysses, degrees) == 4 * 2 * (2048 * (2 * 8 + 2 * 2) * 32 * 4 + 2048 * 2 * 4) // 2


def test_what_travels_of_a_convolution_on_keys(config: Config) -> None:
    config = tiny.with_model(replace(config, parallel=ParallelConfig(context=2, layout="striped")), key_convolution=3)
    without, degrees = tiny.with_model(config, key_convolution=0), Degrees.resolve(config.parallel, 2)
    assert convolution_bytes(without, degrees) == 0
    # Each of 101 rows but the last is read by the next one's rank: 50 a rank, of 2 x 8 numbers in 4 bytes, both ways
    # and in two layers.
    assert convolution_bytes(config, degrees) == 2 * 50 * 16 * (4 + 4)
    long = replace(config, data=replace(config.data, sequence_tokens=1 << 16))
    sent = attention_bytes(long, degrees) + 2 * (1 << 15) * 16 * (4 + 4)
    lines = describe(long, degrees)
    assert f"each rank sends {sent / 2**20:.1f} MiB per sequence" in lines
    assert "attention   Dense(causal=True) of keys convolved over 3, computed by cpu\n" in lines


def test_the_reference_backend_is_marked(config: Config) -> None:
    checked = replace(config, attention=replace(config.attention, backend="reference"))
    assert (
        "attention   Dense(causal=True), computed by reference: for checks only, as it holds all scores, which the "
        "memory below leaves out\n"
    ) in describe(checked, Degrees.resolve(config.parallel, 1))


def test_layers_that_need_different_backends_have_them(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = tiny.with_model(replace(config, attention=AttentionConfig(mechanism="lightning, dense")), layers=4)
    chosen = {Lightning: "triton", Dense: "cuda"}
    monkeypatch.setattr(
        describe_module, "backends_of_layers", lambda config, device: [chosen[type(m)] for m in config.mechanisms()]
    )
    assert ", computed by triton and cuda\n" in describe(mixed, Degrees.resolve(config.parallel, 1))
    chosen[Lightning] = "reference"
    said_so = ", computed by reference: for checks only, as it holds all scores, which the memory below leaves out and "
    assert f"{said_so}cuda\n" in describe(mixed, Degrees.resolve(config.parallel, 1))


def test_libraries_that_the_cuda_backend_calls_are_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = replace(config, attention=replace(config.attention, backend="cuda"))
    monkeypatch.setattr(type(BACKENDS.get("cuda")), "calls", lambda self: "cuDNN, torch's FlashAttention")
    assert ("attention   Dense(causal=True), computed by cuda (cuDNN, torch's FlashAttention)\n") in describe(
        on_cuda, Degrees.resolve(config.parallel, 1)
    )


def test_estimate_of_a_large_run() -> None:
    """Llama 3.1 8B on 8 GPUs, the parts worked out by hand in GiB."""
    config = load_config(Config, CONFIGS / "llama3_8b_128k.toml")
    memory = estimate_memory(config, Degrees.resolve(config.parallel, 8))
    gib = 2**30
    tokens, head, block = 131072 // 8, 128256 * 4096, 218_112_000
    assert memory.states / gib == pytest.approx(8_030_261_248 * 16 / 8 / gib)
    assert memory.gathered / gib == pytest.approx((3 * head + 3 * block) * 2 / gib + block * 4 / gib, rel=1e-3)
    kept = 32 * 4096 * 2 + (4 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336) * 2 + 32 * 4 + 2 * 4096 * 2
    assert memory.activations / gib == pytest.approx(tokens * kept / gib)
    # A chunk of logits within 128 MiB, the gradient of the hidden states, the head's gradient in float32.
    assert memory.working / gib == pytest.approx((tokens * 4096 * 2 + head * 4) / gib + 0.125, rel=0.01)


def test_estimate_of_a_hybrid_with_experts() -> None:
    """MiniMax-style on 8 GPUs, the parts worked out by hand in GiB."""
    config = load_config(Config, CONFIGS / "minimax_style.toml")
    memory = estimate_memory(config, Degrees.resolve(config.parallel, 8))
    gib = 2**30
    tokens, width = 262144 // 8, 2048
    assert memory.states / gib == pytest.approx(20_778_248_192 * 16 / 8 / gib)
    # The residual stream before both norms, these and the norm of out; q, k, v twice, out, gate and their product; two
    # rows to experts and two back; three numbers for each expert in float32.
    block = (2 + 2 + 1 + 6 + 3 + 2 * 2) * width * 2 + 3 * 32 * 4
    assert memory.activations / gib == pytest.approx(tokens * (32 * width * 2 + block + 2 * width * 2) / gib)
    assert memory.working / gib == pytest.approx((tokens * width * 2 + 200064 * width * 4) / gib + 0.125, rel=0.01)
    # Without the loss and SwiGLU, backward of a gated layer: out and q; q, k and v, 16 heads of each, in float32.
    thin = ExpertsConfig(count=32, per_token=2, feed_forward=64)
    small = tiny.with_model(config, vocabulary_size=64, feed_forward=64, experts=thin)
    assert estimate_memory(small, Degrees.resolve(small.parallel, 8)).working == tokens * width * (2 * 2 + 3 * 4)


# Presets by the ranks that their files suggest; what is left of 80 GB is for torch, NCCL and uneven experts.
@pytest.mark.parametrize(
    ("preset", "ranks", "gib"),
    [("qwen3_30b_a3b_128k", 64, 16), ("qwen3_30b_a3b_128k", 16, 37), ("mixtral_8x7b_64k", 32, 33),
     ("mixtral_8x7b_64k", 16, 55), ("minimax_style", 8, 50)],
)  # fmt: skip
def test_presets_fit_their_gpus(preset: str, ranks: int, gib: int) -> None:
    config = load_config(Config, CONFIGS / f"{preset}.toml")
    degrees = Degrees.resolve(config.parallel, ranks)
    validate(config, degrees)
    assert estimate_memory(config, degrees).total / GIB == pytest.approx(gib, abs=1)


def test_patterns_of_layers_are_said_in_short(config: Config) -> None:
    config = tiny.with_model(config, layers=4)
    attention = AttentionConfig(mechanism="lightning*2, dense, dense", backend="cpu")
    config = replace(config, attention=attention, parallel=ParallelConfig(context=2))
    degrees = Degrees.resolve(config.parallel, 2)
    lines = describe(config, degrees).splitlines()
    assert lines[4] == "attention   2 x Lightning, 2 x Dense(causal=True), computed by cpu"
    assert lines[5].startswith("context     state and ring, zigzag; ")
    gated = tiny.with_model(config, recurrent_layer="gated")
    assert describe(gated, degrees).splitlines()[4] == (
        "attention   2 x Lightning, 2 x Dense(causal=True), recurrences gated, computed by cpu"
    )
    assert format_layers(config.mechanisms()) == (
        "Lightning(layer=0, layers=4), Lightning(layer=1, layers=4), 2 x Dense(causal=True)"
    )
