"""From a configuration to the parts of a run: device, data, model, batches."""

from dataclasses import replace
from pathlib import Path

import torch

from farspan.kernels.backend import choose_backend
from farspan.kernels.errors import ConfigError
from farspan.parallel.comm import Channel, Traffic
from farspan.parallel.fsdp import shard_parameters
from farspan.parallel.mesh import Degrees, Mesh
from farspan.parallel.ranks import Ranks
from farspan.parallel.strategy import STRATEGIES, Heads
from farspan.trainer.batch import BatchBuilder
from farspan.trainer.config import Config
from farspan.trainer.data.source import TokenSource
from farspan.trainer.model.init import initialize
from farspan.trainer.model.transformer import Transformer

VOCABULARY_MULTIPLE = 64
"""Matrix products like the vocabulary to be a multiple of this."""


def choose_device(config: Config, ranks: Ranks) -> torch.device:
    """Return this rank's device; raises ConfigError when CUDA is asked for and absent."""
    asked = config.train.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device='cuda' but torch sees no GPU: set train.device=cpu, or install torch for CUDA.")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank)


def fill_in(config: Config, degrees: Degrees, device: torch.device, vocabulary_size: int | None) -> Config:
    """Return the configuration with everything derived written out; `vocabulary_size` is the data's, None if unknown.

    Raises ConfigError when the data has tokens that the model does not know.
    """
    model = config.model
    if model.vocabulary_size == 0:
        if vocabulary_size is None:
            raise ConfigError("model.vocabulary_size=0 takes the data's: prepare data.folder first, or give a number.")
        rounded = -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        model = replace(model, vocabulary_size=rounded)
    elif vocabulary_size is not None and vocabulary_size > model.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size={model.vocabulary_size} is smaller than the {vocabulary_size} tokens of "
            f"data.folder={str(config.data.folder)!r}: raise it, or set 0 to take the data's."
        )
    return replace(
        config,
        model=model,
        parallel=replace(config.parallel, dp_shard=degrees.dp_shard),
        attention=replace(config.attention, backend=choose_backend(config.attention.backend, device)),
        train=replace(config.train, device=device.type),
    )


def open_data(config: Config) -> tuple[TokenSource, TokenSource]:
    """Return the training and the held-out documents."""
    folder = Path(config.data.folder)
    return TokenSource(folder / "train"), TokenSource(folder / "held_out")


def build_model(config: Config, mesh: Mesh, device: torch.device) -> Transformer:
    """Build on meta, shard, materialise this rank's shards alone, and initialise them."""
    compute_dtype = getattr(torch, config.train.compute_dtype)
    with torch.device("meta"):
        model = Transformer(config.model, recompute=config.train.recompute == "block")
    if compute_dtype == torch.float64:
        model = model.double()
    shard_parameters(model, model.blocks, mesh, compute_dtype)
    model.to_empty(device=device)
    initialize(model, config.model, config.run.seed)
    return model


def build_batches(config: Config, mesh: Mesh, device: torch.device, traffic: Traffic) -> BatchBuilder:
    """Return what turns sequences into this rank's micro-batches."""
    return BatchBuilder(
        strategy=STRATEGIES.get(config.parallel.strategy)(Channel(mesh.context, traffic)),
        mechanism=config.attention.build_mechanism(),
        heads=Heads(query=config.model.heads, kv=config.model.kv_heads),
        layout=config.parallel.layout,
        backend=config.attention.backend,
        device=device,
    )
