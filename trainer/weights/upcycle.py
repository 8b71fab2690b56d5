"""Upcycling: a model with mixtures of experts, or of attention experts, from trained dense models.

Of N dense models, expert e is a copy of the feed-forward, or of the attention heads, of model e mod N. All other
parameters are the mean over the models; routers are new. With one model this is sparse upcycling (arXiv 2212.05055),
with several, trained on different data, Branch-Attend-Mix (BAM, arXiv 2408.08274).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.parallel.mesh import Degrees
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.config import Config
from farspan.trainer.data.tokenizer import TOKENIZER_FILE
from farspan.trainer.data.tokenizer_files import have_same_ids
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.validate import experts_fit, head_mixture_fits, mechanism_takes_model, routers_learn
from farspan.trainer.weights.io import (
    Decoder,
    StoredWeights,
    TrainedModel,
    check_absent,
    find_trained_model,
    save_weights,
)
from farspan.trainer.weights.source_files import Files, files_beside

Tensors = Mapping[str, Tensor]


def upcycle(config: Config, runs: Sequence[Path], out: Path) -> None:
    """Write weights for `config` to start from, made of the newest checkpoints of `runs`.

    Raises ConfigError where the models do not fit each other, CheckpointError where a run has no checkpoint.
    """
    check_absent(out)
    dense = [find_trained_model(run) for run in runs]
    vocabulary = config.model.vocabulary_size or dense[0].decoder.model.vocabulary_size
    model = replace(config.model, vocabulary_size=vocabulary)
    if not any(model.expert_layers) and model.head_mixture.kind == "none":
        raise ConfigError("this model has no experts: set model.experts or model.head_mixture.")
    for run, trained in zip(runs, dense, strict=True):
        _check_fit(model, trained.decoder.model, run)
        _check_layers(config, trained.decoder, run)
    files = [files_beside(trained.weights) for trained in dense]
    _check_tokenizers(dict(zip(runs, files, strict=True)))
    experts_fit(config, Degrees(dp_replicate=1, dp_shard=1, context=1))
    head_mixture_fits(config)
    routers_learn(config)
    mechanism_takes_model(config)
    with connected(Ranks(), torch.device("cpu")):
        mixture = Transformer(model, replace(config, model=model).mechanisms())
        if config.train.torch_dtype == torch.float64:
            mixture = mixture.double()
        initialize(mixture, model, config.run.seed)
        sources = [_read(trained) for trained in dense]
        decoder = Decoder(model=model, attention=config.attention)
        save_weights(upcycled(sources, mixture.state_dict()), out, decoder, files[0])


def upcycled(dense: Sequence[Tensors], initial: Tensors) -> dict[str, Tensor]:
    """Return the weights of a model with mixtures; tensors that the dense models lack are those in `initial`."""
    weights = {}
    for name, tensor in initial.items():
        dense_name = name.replace("feed_forward.experts.", "feed_forward.").replace(
            "feed_forward.shared.", "feed_forward."
        )
        sources = [source[dense_name] for source in dense if dense_name in source]
        weights[name] = _mean_or_copies(sources, tensor.shape).to(tensor.dtype) if sources else tensor
    return weights


def _mean_or_copies(sources: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Return the mean of tensors of this shape or, for a larger shape, copies of the tensors in turn."""
    first = sources[0]
    if first.shape == shape:
        return torch.stack(list(sources)).double().mean(0)
    copies = [sources[number % len(sources)] for number in range(shape.numel() // first.numel())]
    if len(shape) > first.dim():
        return torch.stack(copies)  # E x [out, in] -> [E, out, in]
    # Attention experts: rows of the query, key and value matrices, columns of the output matrix.
    return torch.cat(copies, dim=0 if shape[0] > first.shape[0] else 1)


def _read(trained: TrainedModel) -> Tensors:
    shapes, stored = trained.decoder.shapes(), StoredWeights(trained.weights)
    stored.check(shapes)
    return stored.read(shapes)


def _check_fit(model: ModelConfig, dense: ModelConfig, run: Path) -> None:
    mixtures = {"experts": dense.experts.count > 0, "head_mixture": dense.head_mixture.kind != "none"}
    for name, is_mixture in mixtures.items():
        if is_mixture:
            raise ConfigError(f"{run} has model.{name} already: upcycle dense runs.")
    dense_fields = asdict(dense)
    for name, value in asdict(model).items():
        if name not in mixtures and value != dense_fields[name]:
            raise ConfigError(
                f"{run} has model.{name}={dense_fields[name]!r}, not {value!r}: experts are copies, set the same."
            )
    experts = model.experts
    if experts.count and experts.feed_forward != dense.feed_forward:
        raise ConfigError(
            f"model.experts.feed_forward={experts.feed_forward} must be the model.feed_forward={dense.feed_forward} of "
            f"{run}: experts are copies of its feed-forward."
        )
    if experts.shared not in (0, dense.feed_forward):
        raise ConfigError(
            f"model.experts.shared={experts.shared} must be 0 or the model.feed_forward={dense.feed_forward} of {run}: "
            "the shared expert is a mean of feed-forwards."
        )


def _check_tokenizers(files: Mapping[Path, Files]) -> None:
    """Refuse models with other token ids. files: of each run; those without a tokenizer cannot be compared."""
    kept = [(run, beside[TOKENIZER_FILE]) for run, beside in files.items() if TOKENIZER_FILE in beside]
    for run, tokenizer in kept[1:]:
        if not have_same_ids(kept[0][1], tokenizer):
            raise ConfigError(
                f"{run} was trained with another {TOKENIZER_FILE} than {kept[0][0]}: upcycle runs with one tokenizer."
            )


def _check_layers(config: Config, dense: Decoder, run: Path) -> None:
    """Refuse layers of another kind, whose matrices have the same names: `_mean_or_copies` would mix them up."""
    for new, old in zip(config.mechanisms(), dense.mechanisms(), strict=True):
        other_router = new.routing_width and old.routing_width and type(new) is not type(old)
        if config.model.is_gated(new) != dense.model.is_gated(old) or other_router:
            raise ConfigError(
                f"{run} has attention.mechanism={dense.attention.mechanism!r}, whose layers have other matrices than "
                f"those of {config.attention.mechanism!r}: set the same."
            )
