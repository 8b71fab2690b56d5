"""A run so small that a test can afford it: real files through the real data preparation, a model of a few thousand
parameters."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import AttentionConfig, Config, DataConfig, RunConfig, TrainConfig
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.source import META_FILE, SPLITS
from farspan.trainer.data.tokenizer import load_tokenizer
from farspan.trainer.model.config import ExpertsConfig, ModelConfig
from farspan.trainer.optim import OptimizerConfig

SEQUENCE_TOKENS = 101
"""Odd and prime: every layout has to pad it."""
EXPERTS = ExpertsConfig(count=4, feed_forward=16, score="sigmoid", bias_rate=0.05, balance_loss=0.01, z_loss=0.01)


def make_data(folder: Path, *, words: int = 23) -> Path:
    """Prepare a few dozen documents of 5 to 200 bytes, made of some words; return the prepared folder."""
    text = folder / "text"
    text.mkdir()
    for number in range(60):
        content = " ".join(f"word{(number * 7 + i * i) % words}" for i in range(1 + number * 5 % 31))
        (text / f"{number:02}.txt").write_text(content)
    prepare([text], tokenizer=load_tokenizer("bytes"), out=folder / "tokens", validation_fraction=0.2)
    return folder / "tokens"


def with_tokenizer(data: Path, out: Path, content: bytes) -> Path:
    """Copy prepared data, as if this tokenizer.json had been used for it."""
    shutil.copytree(data, out, dirs_exist_ok=True)
    (out / "tokenizer").mkdir(exist_ok=True)
    (out / "tokenizer" / "tokenizer.json").write_bytes(content)
    (out / "tokenizer" / "tokenizer_config.json").write_bytes(b"{}")
    for split in SPLITS:
        meta = json.loads((out / split / META_FILE).read_text())
        meta |= {"tokenizer": "tokenizer.json", "tokenizer_sha256": hashlib.sha256(content).hexdigest()}
        (out / split / META_FILE).write_text(json.dumps(meta))
    return out


def config(data: Path, folder: Path, parallel: ParallelConfig, *, steps: int = 10) -> Config:
    """A float64 run of two sequences a step."""
    return Config(
        run=RunConfig(folder=folder, seed=11),
        model=ModelConfig(
            layers=2, width=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48, vocabulary_size=264, qk_norm=True
        ),
        data=DataConfig(folder=data, sequence_tokens=SEQUENCE_TOKENS),
        train=TrainConfig(steps=steps, sequences_per_step=2, compute_dtype="float64", device="cpu"),
        attention=AttentionConfig(backend="cpu"),
        parallel=parallel,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3, max_gradient_norm=0.5),
    )


def with_model(base: Config, **changes: object) -> Config:
    """Return `base` with other model fields."""
    return replace(base, model=replace(base.model, **changes))  # pyright: ignore[reportArgumentType]
