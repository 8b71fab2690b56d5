"""From a configuration to a resolved one: checked against ranks, devices and data, everything derived written out."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from farspan.errors import ConfigError, DataError
from farspan.parallel.mesh import Degrees
from farspan.parallel.ranks import Ranks
from farspan.trainer.auto import choose_strategy
from farspan.trainer.build import backends_of_layers
from farspan.trainer.config import Config
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.validate import validate

VOCABULARY_MULTIPLE = 64
"""Matrix products like the vocabulary to be a multiple of this."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Resolved:
    """A configuration that can run on this rank, and what was found out on the way."""

    config: Config
    degrees: Degrees
    device: torch.device
    train_source: TokenSource
    validation_source: TokenSource
    why: tuple[str, ...]
    """Lines that say why the strategy was chosen, if it was left open."""


def resolve(config: Config, ranks: Ranks) -> Resolved:
    """Check everything that can be checked before ranks meet; raises ConfigError or DataError."""
    degrees = Degrees.resolve(config.parallel, ranks.world_size)
    validate(config, degrees)
    device = choose_device(config, ranks.local_rank)
    train_source, validation_source = open_data(config)
    config, why = choose_strategy(config, degrees, device.type)
    return Resolved(
        config=fill_in(config, degrees, device, train_source.vocabulary_size),
        degrees=degrees,
        device=device,
        train_source=train_source,
        validation_source=validation_source,
        why=tuple(why),
    )


def choose_device(config: Config, local_rank: int) -> torch.device:
    """Return the device of one rank of this machine; raises ConfigError when it has to be a GPU that is not there."""
    asked, num_gpus = config.train.device, torch.cuda.device_count()
    if asked == "cpu" or (asked == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise ConfigError("train.device='cuda' but torch sees no GPU: set train.device=cpu, or install torch for CUDA.")
    if local_rank >= num_gpus:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU, torch sees {num_gpus}: start {num_gpus} ranks per machine, "
            "or set train.device=cpu."
        )
    return torch.device("cuda", local_rank)


def open_data(config: Config) -> tuple[TokenSource, TokenSource]:
    """Return the training and the held-out documents; raises DataError when they cannot be read or used."""
    folder = Path(config.data.folder)
    _check_prepared(folder)
    sources = TokenSource(folder / SPLITS[0]), TokenSource(folder / SPLITS[1])
    for split, source in zip(SPLITS, sources, strict=True):
        if source.num_tokens == source.num_documents:
            raise DataError(f"{folder / split} has documents of one token only, which teach nothing; prepare others.")
    if sources[0].vocabulary_size != sources[1].vocabulary_size:
        raise DataError(
            f"{folder} has train/ of {sources[0].vocabulary_size} tokens and validation/ of "
            f"{sources[1].vocabulary_size}: prepare both together."
        )
    return sources


def _check_prepared(folder: Path) -> None:
    if (folder / META_FILE).is_file():
        raise DataError(f"data.folder={str(folder)!r} is one split of the data: set data.folder={folder.parent}.")
    missing = next((f"{split}/{META_FILE}" for split in SPLITS if not (folder / split / META_FILE).is_file()), None)
    if missing is not None:
        state = f"has no {missing}" if folder.exists() else "does not exist"
        raise DataError(f"data.folder={str(folder)!r} {state}: make it with `farspan data prepare`, or name another.")


def fill_in(config: Config, degrees: Degrees, device: torch.device, vocabulary_size: int | None) -> Config:
    """Return the configuration with everything derived written out; `vocabulary_size` is the data's, None if unknown.

    Raises ConfigError when the data has tokens that the model does not know, or the backend cannot run on `device`.
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
    backends = set(backends_of_layers(config, device))
    # Layers that need different backends each choose their own, again.
    backend = backends.pop() if len(backends) == 1 else config.attention.backend
    return replace(
        config,
        model=model,
        parallel=replace(config.parallel, dp_shard=degrees.dp_shard),
        attention=replace(config.attention, backend=backend),
        train=replace(config.train, device=device.type),
    )
