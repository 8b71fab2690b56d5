"""Upcycling: a model with experts, and experts of attention, from trained models without.

Expert e is a copy of what the dense models have in its place, of model e mod N for N of them; all that is not chosen
is their mean; routers are new. One model is sparse upcycling (arXiv 2212.05055), several that were trained on different
data are Branch-Attend-Mix (BAM, arXiv 2408.08274).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.parallel.mesh import Degrees
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.checkpoint.verify import newest_complete
from farspan.trainer.config import Config
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.toml_config import load_config
from farspan.trainer.validate import experts_fit, head_mixture_fits, mechanism_takes_model
from farspan.trainer.weights.io import StoredWeights, save_weights
from farspan.trainer.weights.locate import Decoder

Tensors = Mapping[str, Tensor]


def upcycle(config: Config, runs: Sequence[Path], out: Path) -> None:
    """Write the weights that `config` can begin with, made of the newest checkpoints of `runs`.

    Raises ConfigError where the models do not fit each other, CheckpointError where there is nothing to read.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already: name another folder, or delete it.")
    dense = [load_config(Config, run / "config.toml") for run in runs]
    vocabulary = config.model.vocabulary_size or dense[0].model.vocabulary_size
    model = replace(config.model, vocabulary_size=vocabulary)
    if not any(model.expert_layers) and model.head_mixture.kind == "none":
        raise ConfigError("a model without experts leaves nothing to choose: set model.experts or model.head_mixture.")
    for run, of_run in zip(runs, dense, strict=True):
        _check_fit(model, of_run.model, run)
        _check_layers(config, of_run, run)
    experts_fit(config, Degrees(dp_replicate=1, dp_shard=1, context=1))
    head_mixture_fits(config)
    mechanism_takes_model(config)
    with connected(Ranks(), torch.device("cpu")):
        mixture = Transformer(model, replace(config, model=model).mechanisms())
        if config.train.torch_dtype == torch.float64:
            mixture = mixture.double()
        initialize(mixture, model, config.run.seed)
        sources = [_tensors_of(*each) for each in zip(runs, dense, strict=True)]
        save_weights(mixed_of(sources, mixture.state_dict()), out)


def mixed_of(dense: Sequence[Tensors], start: Tensors) -> dict[str, Tensor]:
    """Return the weights of a model with mixtures, of weights of dense ones; what these lack is as in `start`."""
    mixed = {}
    for name, tensor in start.items():
        plain = name.replace("feed_forward.experts.", "feed_forward.").replace("feed_forward.shared.", "feed_forward.")
        sources = [source[plain] for source in dense if plain in source]
        mixed[name] = _combined(sources, tensor.shape).to(tensor.dtype) if sources else tensor
    return mixed


def _combined(sources: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Return the mean of tensors or, where the shape has room for more than one, copies of them in turn."""
    one = sources[0]
    if one.shape == shape:
        return torch.stack(list(sources)).double().mean(0)
    copies = [sources[number % len(sources)] for number in range(shape.numel() // one.numel())]
    if len(shape) > one.dim():
        return torch.stack(copies)
    # Queries, and keys of their own, have rows for each expert; the output matrix has columns.
    return torch.cat(copies, dim=0 if shape[0] > one.shape[0] else 1)


def _tensors_of(run: Path, config: Config) -> Tensors:
    shapes = Decoder(model=config.model, attention=config.attention).shapes()
    stored = StoredWeights(newest_complete(run / "checkpoints"))
    stored.check(shapes)
    return stored.read(shapes)


def _check_fit(model: ModelConfig, dense: ModelConfig, run: Path) -> None:
    mine, theirs = asdict(model), asdict(dense)
    for mixture, without in (
        ("experts", dense.experts.count == 0),
        ("head_mixture", dense.head_mixture.kind == "none"),
    ):
        if not without:
            raise ConfigError(f"{run} has model.{mixture} already: upcycle runs without.")
        del mine[mixture], theirs[mixture]
    for name, value in mine.items():
        if value != theirs[name]:
            raise ConfigError(
                f"{run} has model.{name}={theirs[name]!r}, not {value!r}: experts are copies, set the same."
            )
    experts = model.experts
    if experts.count and experts.feed_forward != dense.feed_forward:
        raise ConfigError(
            f"model.experts.feed_forward={experts.feed_forward} must be the model.feed_forward={dense.feed_forward} of "
            f"{run}, which experts are copies of."
        )
    if experts.shared not in (0, dense.feed_forward):
        raise ConfigError(
            f"model.experts.shared={experts.shared} must be 0 or the model.feed_forward={dense.feed_forward} of {run}, "
            "whose mean the shared expert is."
        )


def _check_layers(config: Config, dense: Config, run: Path) -> None:
    """Layers of another kind have matrices of the same names and other sizes, which would be taken for copies."""
    for mine, theirs in zip(config.mechanisms(), dense.mechanisms(), strict=True):
        routed_differently = mine.routing_width and theirs.routing_width and type(mine) is not type(theirs)
        if config.model.is_gated(mine) != dense.model.is_gated(theirs) or routed_differently:
            raise ConfigError(
                f"{run} has attention.mechanism={dense.attention.mechanism!r}, whose layers have other matrices than "
                f"those of {config.attention.mechanism!r}: set the same."
            )
