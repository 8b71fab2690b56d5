"""Runs without data, and logits of a decoder, for tests of import and export."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.build import build_batches
from farspan.trainer.checkpoint.checkpointer import Checkpointer
from farspan.trainer.config import AttentionConfig, CheckpointConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.data.packing import PackedSequence
from farspan.trainer.engines.fsdp2 import Fsdp2Engine
from farspan.trainer.model.config import ExpertsConfig, ModelConfig, RopeConfig
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.state import TrainState
from farspan.trainer.toml_config import to_toml
from farspan.trainer.weights.io import Decoder, load_weights

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(5))
"""More than the original context length of `YARN` and `LLAMA3`."""
YARN = RopeConfig(scaling="yarn", factor=4.0, original_positions=64, beta_fast=2.0, beta_slow=0.25)
LLAMA3 = RopeConfig(base=5e5, scaling="llama3", factor=8.0, original_positions=40)
MODEL = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_dim=16, feed_forward=40, vocabulary_size=96, norm_epsilon=1e-6
)
EXPERTS = ExpertsConfig(count=5, per_token=2, feed_forward=24)


def run_config(decoder: Decoder, folder: Path) -> Config:
    """A run of this decoder whose data does not exist."""
    return Config(
        run=RunConfig(folder=folder),
        model=decoder.model,
        data=DataConfig(folder=folder / "nowhere", sequence_tokens=512),
        train=TrainConfig(steps=1, compute_dtype="float32", device="cpu"),
        attention=AttentionConfig(mechanism=decoder.attention.mechanism, options=decoder.attention.options),
    )


def random_model(decoder: Decoder) -> Transformer:
    """A model with random norms, too."""
    model = Transformer(decoder.model, decoder.mechanisms())
    initialize(model, decoder.model, seed=3)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return model


def save_run(model: Transformer, decoder: Decoder, folder: Path) -> Path:
    """Write a run with one checkpoint; return its folder."""
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(run_config(decoder, folder)))
    with connected(Ranks(), CPU):
        engine = Fsdp2Engine(model, torch.optim.AdamW(model.parameters()))
        Checkpointer(folder / "checkpoints", engine, identity={}, defaults={}, config=CheckpointConfig(keep=1)).save(
            TrainState(step=1)
        )
    return folder


def save_demo(folder: Path) -> None:
    """Write the run `runs/demo` that pages load, below a folder: random weights, bytes as tokens."""
    (folder / "runs").mkdir()
    decoder = Decoder(model=replace(MODEL, vocabulary_size=320))
    save_run(random_model(decoder), decoder, folder / "runs" / "demo")


def logits(decoder: Decoder, weights: Path, tokens: Tensor = TOKENS) -> Tensor:
    """Return `[T, V]` in float32, of one document."""
    config = run_config(decoder, Path(tempfile.gettempdir()))
    hidden: list[Tensor] = []
    with connected(Ranks(), CPU), torch.no_grad():
        model = Transformer(decoder.model, decoder.mechanisms())
        load_weights(model, weights)

        model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))  # pyright: ignore
        count = len(tokens)
        sequence = PackedSequence(
            tokens=tokens.numpy(),
            labels=np.zeros(count, dtype=np.int64),
            position=np.arange(count, dtype=np.int32),
            document=np.zeros(count, dtype=np.int32),
        )
        batch = build_batches(config, Mesh.build(ParallelConfig(), "cpu"), CPU, Traffic()).build(sequence)
        losses = model(batch.tokens, batch.labels, batch.context).losses
        logits = hidden[0] @ model.head.weight.t()
    assert torch.allclose(losses, logits.logsumexp(-1) - logits[:, 0], atol=1e-5), "logits are those of the losses"
    return logits


def replaced_positions(model: ModelConfig, positions: int) -> ModelConfig:
    """Return `model` after an export and import: files of Hugging Face have its context length."""
    return replace(model, rope=replace(model.rope, original_positions=positions))
