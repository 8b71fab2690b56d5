"""The configuration of a run: each section is the dataclass of the code that reads it, documented field by field."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from farspan.errors import ConfigError
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.monitoring.profiler import ProfileConfig
from farspan.trainer.monitoring.wandb_run import MetricsConfig
from farspan.trainer.optim import OptimizerConfig
from farspan.trainer.resilience.skip_steps import SkipConfig
from farspan.trainer.resilience.watchdog import WatchdogConfig
from farspan.trainer.toml_config import bounded, from_tree, parse_pattern, toml_value

AUTO = "auto"
"""The value of parallel.strategy that leaves it to the cost model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    folder: Path
    """Where everything that the run writes goes."""
    seed: int = bounded(0, minimum=0)
    """Seeds the initial parameters and the order of the data."""
    start_from: Path | None = None
    """Initial weights, for a run without checkpoints: a folder that `farspan import` or `farspan upcycle` wrote, or one
    step below another run's checkpoints/. Without it parameters are random."""
    replay: Path | None = None
    """A folder below a run's failed_batch/: compute that batch with the parameters of the newest checkpoint, log what
    is not finite, and end, without changing anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    mechanism: str = "dense"
    """Which keys a query attends to: a file of kernels/mechanisms/, or a pattern of layers, 'lightning*7, dense'."""
    options: dict[str, Any] = field(default_factory=dict)
    """The mechanism's options, see [attention.options]; for a pattern of several, a table for each, by its name."""
    backend: str = "auto"
    """The implementation, a file of kernels/backends/; `auto` takes the best for each layer; the header says why."""

    def build_mechanisms(self, layers: int) -> tuple[Mechanism, ...]:
        """Return the mechanism of each layer; the pattern is repeated.

        Raises ConfigError for an unknown name or option, or one that the mechanism does not support.
        """
        numbered = enumerate(self.build_pattern(layers))
        return tuple(mechanism.in_layer(layer, layers) for layer, mechanism in numbered)

    def build_pattern(self, layers: int) -> tuple[Mechanism, ...]:
        """Return them without the numbers of their layers, by which no costs differ."""
        pattern = parse_pattern(self.mechanism, "attention.mechanism")
        names, count = list(dict.fromkeys(pattern)), len(pattern)
        for period in range(1, count):
            if pattern == pattern[:period] * (count // period):
                raise ConfigError(
                    f"attention.mechanism={self.mechanism!r} repeats itself, as every pattern does over the layers "
                    "anyway: options go by name, so that layers of one name cannot differ; write "
                    f"{', '.join(pattern[:period])!r}."
                )
        for name in self.options:
            if len(names) > 1 and name not in names:
                raise ConfigError(
                    f"attention.options.{name} is for none of attention.mechanism={self.mechanism!r}: "
                    f"give each a table of its own, attention.options.{names[0]} and so on, or drop what a "
                    "configuration has by attention.options={}."
                )
        built = {}
        for name in names:
            options, where = self.options, "attention.options"
            if len(names) > 1:
                options, where = self.options.get(name, {}), f"attention.options.{name}"
            try:
                built[name] = from_tree(MECHANISMS.get(name), options, where)
                _ = built[name].static_mask  # masks check options too
            except ConfigError as error:
                # They may be left from another mechanism, in a file that the command line changes.
                raise ConfigError(f"{error} To drop all options of a file, add attention.options={{}}.") from error
            except ValueError as error:
                raise ConfigError(
                    f"{where}={toml_value(options)} does not suit attention.mechanism={self.mechanism!r}: {error}."
                ) from error
        return tuple(built[pattern[layer % count]] for layer in range(layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    folder: Path
    """Made by `farspan data prepare`, with train/ and validation/."""
    sequence_tokens: int = bounded(minimum=2)
    """The context length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    steps: int = bounded(minimum=1)
    """Updates of the whole run."""
    sequences_per_step: int = bounded(1, minimum=1)
    """The global batch; gradient accumulation follows from it and the mesh."""
    compute_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """The dtype of activations and gathered parameters; master parameters, gradient sums and optimizer state have
    float32 (float64 for float64). float16 is missing since it needs loss scaling."""
    recompute: Literal["none", "block"] = "none"
    """Activation checkpointing: which activations the backward pass computes again."""
    compile: bool = False
    """Compile blocks by torch.compile: what is between matrix products, attention and communication becomes few
    kernels. Starting takes longer, by up to minutes."""
    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """What shards parameters, gradients and optimizer state: FSDP2 of torch, or DeepSpeed's ZeRO, see [deepspeed]."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """For train.engine=deepspeed."""

    zero_stage: int = bounded(2, minimum=0, maximum=3)
    """What ZeRO shards over all ranks: nothing (0), optimizer state (1), gradients too (2), parameters too (3)."""
    config: Path | None = None
    """A JSON file of DeepSpeed's own settings, such as zero_optimization.offload_optimizer; those that farspan sets are
    refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = bounded(100, minimum=1)
    """How often to save; the end of the run and a stop signal save too."""
    keep: int = bounded(2, minimum=1)
    """How many of the newest checkpoints to keep."""
    permanent_every_steps: int = bounded(0, minimum=0)
    """Never delete checkpoints whose step is a multiple of this; 0 for none."""
    background: bool = True
    """Save while the run goes on, from a copy in CPU memory."""
    accept_changed: tuple[str, ...] = ()
    """Settings that may differ from those that a checkpoint was trained with, such as ["data.folder"]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    every_steps: int = bounded(100, minimum=0)
    """How often to measure held-out loss; 0 only at the end."""
    sequences: int = bounded(8, minimum=1)
    """How many held-out sequences of each set to measure it on, a random sample; all if there are fewer."""
    seed: int = bounded(0, minimum=0)
    """Draws the sample, which is the same at every evaluation."""
    sets: dict[str, Path] = field(default_factory=dict)
    """Further validation sets, a folder for each name: of the validation/ of prepared data, or of another split that is
    named, such as data/books/train. Metrics of set `code` are called `code_loss` and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    skip: SkipConfig = field(default_factory=SkipConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Return the mechanism of each layer; see `AttentionConfig.build_mechanisms`."""
        return self.attention.build_mechanisms(self.model.layers)


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting of a section, or of a configuration, by its dotted name, such as `model.rope.base`."""

    def leaves(tree: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                found |= leaves(value, f"{where}{name}.")
            else:
                found[f"{where}{name}"] = str(value) if isinstance(value, Path) else value
        return found

    return leaves(asdict(section), prefix)
