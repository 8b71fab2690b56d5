"""The whole configuration of a run: each section is the dataclass of the code that reads it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from farspan.errors import ConfigError
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.optim import OptimizerConfig
from farspan.trainer.pattern import parse_pattern
from farspan.trainer.resilience.skip_steps import SkipConfig
from farspan.trainer.resilience.watchdog import WatchdogConfig
from farspan.trainer.toml_config import bounded, from_tree, toml_value

AUTO = "auto"
"""The value of parallel.strategy that leaves it to the cost model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """folder: where everything that the run writes goes. seed: of parameters and of the order of the data.

    start_from: a folder of weights that a run without checkpoints begins with, such as `farspan import` and `farspan
    upcycle` write, or one step below another run's checkpoints/; without one parameters are random.
    replay: a folder below a run's failed_batch/. The run then computes that batch with the parameters of its newest
    checkpoint, says what is not finite, and ends; it changes nothing.
    """

    folder: Path
    seed: int = bounded(0, minimum=0)
    start_from: Path | None = None
    replay: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """mechanism: what a query may attend to, a file of kernels/mechanisms/, or by layers, 'lightning*7, dense'.

    options: the fields of that file's class; of several mechanisms, a table of them for each, by its name.
    backend: what computes it, a file of kernels/backends/; `auto` takes the fastest.
    """

    mechanism: str = "dense"
    options: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"

    def build_mechanisms(self, layers: int) -> tuple[Mechanism, ...]:
        """Return the mechanism of each layer; the pattern is repeated.

        Raises ConfigError for an unknown name or option, or one that the mechanism refuses.
        """
        pattern = parse_pattern(self.mechanism, "attention.mechanism")
        options, where = self._options(list(dict.fromkeys(pattern)))
        built = {name: self._build(name, options[name], where[name]) for name in options}
        return tuple(built[pattern[layer % len(pattern)]].in_layer(layer, layers) for layer in range(layers))

    def _options(self, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the options of each mechanism, and where they stand."""
        if len(names) == 1:
            return {names[0]: self.options}, {names[0]: "attention.options"}
        for name in self.options:
            if name not in names:
                raise ConfigError(
                    f"attention.options.{name} is for none of attention.mechanism={self.mechanism!r}: "
                    f"give each a table of its own, attention.options.{names[0]} and so on."
                )
        return {name: self.options.get(name, {}) for name in names}, {n: f"attention.options.{n}" for n in names}

    def _build(self, name: str, options: dict[str, Any], where: str) -> Mechanism:
        try:
            mechanism = from_tree(MECHANISMS.get(name), options, where)
            _ = mechanism.static_mask  # masks check options too
        except ValueError as error:
            raise ConfigError(
                f"{where}={toml_value(options)} does not suit attention.mechanism={self.mechanism!r}: {error}."
            ) from error
        return mechanism


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """folder: made by `farspan data prepare`, with `train/` and `validation/`. sequence_tokens: the context length."""

    folder: Path
    sequence_tokens: int = bounded(minimum=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """steps: updates in all. sequences_per_step: the global batch; accumulation follows from it and the mesh.

    compute_dtype: of activations and gathered parameters; master parameters, gradient sums and optimizer state are
    float32 (float64 for float64). float16 is missing since it needs loss scaling. recompute: which activations are
    computed again instead of kept. device: `auto` takes a GPU where there is one.
    """

    steps: int = bounded(minimum=1)
    sequences_per_step: int = bounded(1, minimum=1)
    compute_dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    recompute: Literal["none", "block"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """every_steps: how often to save; the end of the run and a stop signal save too. keep: how many to keep.

    permanent_every: checkpoints of every so many steps are kept for good, 0 for none. background: save while the run
    goes on, which takes a copy of what is saved in the memory of the CPU. accept_changed: settings that may differ from
    those a checkpoint was trained with, such as ["data.folder"].
    """

    every_steps: int = bounded(100, minimum=1)
    keep: int = bounded(2, minimum=1)
    permanent_every: int = bounded(0, minimum=0)
    background: bool = True
    accept_changed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """every_steps: how often to measure held-out loss, 0 only at the end. sequences: how many to measure it on."""

    every_steps: int = bounded(100, minimum=0)
    sequences: int = bounded(8, minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run; see each section."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    skip: SkipConfig = field(default_factory=SkipConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Return the mechanism of each layer; see `AttentionConfig.build_mechanisms`."""
        return self.attention.build_mechanisms(self.model.layers)


def flat(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted name, such as `model.rope.base`."""

    def leaves(tree: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                found |= leaves(value, f"{where}{name}.")
            else:
                found[f"{where}{name}"] = str(value) if isinstance(value, Path) else value
        return found

    return leaves(asdict(config), "")
