"""Trained models: a run, a checkpoint of it, or weights without a run; what a run starts from.

Weights are a folder of torch DCP shards with a manifest, which older ones lack. A checkpoint of a run is such a folder,
too; its optimizer state is not read.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from farspan.errors import CheckpointError, ConfigError
from farspan.kernels.mechanism import Mechanism
from farspan.trainer.checkpoint.identity import identity_defaults, resume_identity
from farspan.trainer.checkpoint.manifest import MANIFEST, DamagedError, Manifest
from farspan.trainer.checkpoint.shards import (
    INDEX,
    MisfitError,
    misfit,
    read_alone,
    read_index,
    read_shards,
    write_shards,
)
from farspan.trainer.checkpoint.steps import step_of
from farspan.trainer.checkpoint.verify import check_complete, newest_complete, verified
from farspan.trainer.config import AttentionConfig, Config, flat
from farspan.trainer.model.config import ModelConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.renamed import current_names
from farspan.trainer.resilience.agreement import on_first_rank, raise_on_all_ranks
from farspan.trainer.toml_config import load_config, to_toml
from farspan.trainer.weights.source_files import DECODER_FILE, Files, write_files

PREFIX = "model."
"""Prefix of parameter names in a folder, which may contain optimizer state, too."""
EMBEDDING, HEAD = "embedding.weight", "head.weight"
"""Names of one table in a model with tied embeddings."""
UNTIL_STEP = re.compile(r"config_until_step_(\d+)\.toml")
"""Configurations of a run up to a step that a later one replaced, see `record_config` in trainer/metrics.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The model that weights belong to; `model.toml` beside them, as sections of the configuration of a run."""

    model: ModelConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def mechanisms(self) -> tuple[Mechanism, ...]:
        return self.attention.build_mechanisms(self.model.layers)

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each parameter and buffer; a tied table has both of its names."""
        with torch.device("meta"):
            return {name: part.shape for name, part in Transformer(self.model, self.mechanisms()).state_dict().items()}

    def text(self) -> str:
        """Return the sections as TOML, without defaults."""
        return to_toml(self, brief=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A decoder and the folder of its weights; run: the configuration that a run trained them with, if one has."""

    decoder: Decoder
    weights: Path
    run: Config | None


def find_trained_model(folder: Path) -> TrainedModel:
    """Return the model in `folder`: a run, one step in its checkpoints/, or weights with a `model.toml`.

    Raises CheckpointError where it is none of them, or has no complete checkpoint, or is not as it was written.
    """
    if (folder / DECODER_FILE).is_file():
        if (folder / MANIFEST).is_file():
            check_complete(folder)
        return TrainedModel(decoder=load_config(Decoder, folder / DECODER_FILE), weights=folder, run=None)
    is_step = folder.absolute().parent.name == "checkpoints"
    run = folder.absolute().parent.parent if is_step else folder
    if not (run / "config.toml").is_file():
        raise CheckpointError(
            f"{folder} is not a trained model: name the folder of a run, one step in its checkpoints/, weights with a "
            f"{DECODER_FILE}, as `farspan import` writes, or, for farspan.load, a Hugging Face folder with config.json."
        )
    if is_step:
        check_complete(folder)
    weights = folder if is_step else newest_complete(run / "checkpoints")
    config = config_of(run, weights)
    return TrainedModel(decoder=Decoder(model=config.model, attention=config.attention), weights=weights, run=config)


def config_of(run: Path, checkpoint: Path) -> Config:
    """Return the configuration that a checkpoint was trained with: of all that its run has had, the one it records.

    Raises CheckpointError where it is none of them.
    """
    step, recorded = step_of(checkpoint), Manifest.read(checkpoint).identity
    until = {int(match[1]): path for path in run.iterdir() if (match := UNTIL_STEP.fullmatch(path.name))}
    later = [until[last] for last in sorted(until) if last >= step]
    # A run that went back to an older checkpoint may have kept a configuration for other steps than its own.
    earlier = [until[last] for last in sorted(until, reverse=True) if last < step]
    problems = []
    for path in (*later, run / "config.toml", *earlier):
        try:
            config = load_config(Config, path)
        except ConfigError as error:
            problems.append(str(error).rstrip("."))
            continue
        difference = _difference(config, recorded)
        if difference is None:
            return config
        problems.append(f"{path} has {difference}")
    raise CheckpointError(
        f"checkpoint {checkpoint} was trained with another configuration than its run has ({problems[0]}): restore the "
        "file."
    )


def _difference(config: Config, recorded: Mapping[str, Any]) -> str | None:
    """Return the first setting of model, mechanism or length that a checkpoint records with another value."""
    # As JSON reads them back: tuples become lists.
    settings, defaults = json.loads(json.dumps((resume_identity(config, ""), identity_defaults(config))))
    saved = {**defaults, **current_names(recorded)} if recorded else {}
    for name in settings.keys() & saved.keys() - {"run.seed", "data.folder"}:
        if settings[name] != saved[name]:
            return f"{name}={settings[name]!r}, not {saved[name]!r}"
    return None


def other_settings(config: Config, weights: Path) -> list[str]:
    """Return the settings of model and attention that differ from those in the weights' `model.toml`, if there is one.

    Weights of any mechanism and RoPE fill a model of the same shapes.
    """
    if not (weights / DECODER_FILE).is_file():
        return []
    theirs = flat(load_config(Decoder, weights / DECODER_FILE))
    ours = flat(Decoder(model=config.model, attention=config.attention))
    if config.model.rope.scaling == theirs["model.rope.scaling"] == "none":
        del ours["model.rope.original_positions"]
    return [
        f"{name} ({theirs.get(name, 'unset')}, now {value})"
        for name, value in ours.items()
        if name != "attention.backend" and theirs.get(name) != value
    ]


def load_weights(model: Transformer, folder: Path) -> None:
    """Fill a model, sharded or not, with the weights in `folder`, as `fill_with_weights` does."""
    tensors = cast(dict[str, Tensor], get_model_state_dict(model))
    fill_with_weights(tensors, folder, tied=model.config.tied_embeddings)
    set_model_state_dict(model, {**tensors})


def fill_with_weights(tensors: dict[str, Tensor], folder: Path, *, tied: bool) -> None:
    """Fill the tensors of a model, by name, with the weights in `folder`; every rank makes the same call.

    Raises CheckpointError where there are none, or those of another model, or where a file is not as it was written;
    tensors may be half filled then.
    """
    raise_on_all_ranks(lambda: check_weights(folder))
    if tied:
        # One table has both names; read apart, they can be compared.
        tensors[HEAD] = torch.empty_like(tensors[EMBEDDING])
    # Weights that older versions wrote have no manifest.
    files = on_first_rank(lambda: Manifest.read(folder).files if (folder / MANIFEST).is_file() else {})
    try:
        with verified(folder, files):
            read_shards({"model": tensors}, folder)
    except MisfitError as error:
        raise CheckpointError(f"{folder} does not fill this model ({error}): change model.*.") from None
    except DamagedError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged ({error}): write it again.") from None
    raise_on_all_ranks(lambda: _check_all_used(folder, tensors))
    raise_on_all_ranks(lambda: _check_values(folder, tensors, tied=tied))


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where `folder` has no weights."""
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no weights: name a folder that `farspan upcycle` or `farspan import` wrote, or one step "
            "in a run's checkpoints/."
        )


def _check_all_used(folder: Path, tensors: Mapping[str, object]) -> None:
    """DCP lets a model with fewer layers, or without a norm, load a part of a larger one: that is another model."""
    unused = [name for name in StoredWeights(folder).names if name not in tensors]
    if unused:
        raise CheckpointError(
            f"{folder} holds weights that this model does not have ({unused[0]}{', ...' if len(unused) > 1 else ''}): "
            "change model.*."
        )


def _check_values(folder: Path, tensors: Mapping[str, Tensor], *, tied: bool) -> None:
    """Refuse numbers that are not finite, such as those in float64 that float32 cannot hold, and tables that differ."""
    local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    for name, tensor in local.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{folder} has numbers in {name} that are not finite in {tensor.dtype}: start from other weights."
            )
    if tied and not torch.equal(local[EMBEDDING], local[HEAD]):
        raise CheckpointError(
            f"{folder} has a {HEAD} that differs from its {EMBEDDING}: set model.tied_embeddings=false."
        )


class StoredWeights:
    """Full tensors of a folder of weights, on the CPU; `read` loads only those asked for. No other rank takes part."""

    def __init__(self, folder: Path) -> None:
        """Read the index; raises CheckpointError for a folder without weights, or with a damaged index."""
        check_weights(folder)
        try:
            stored = read_index(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} is damaged ({error}): write it again.") from None
        self._folder = folder
        self._tensors = {
            name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)
        }

    @property
    def names(self) -> list[str]:
        return sorted(self._tensors)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError unless there is a tensor of each name and shape."""
        for name, shape in shapes.items():
            if problem := misfit(name, self._tensors.get(name), shape):
                raise CheckpointError(
                    f"{self._folder} does not fill the model that its configuration describes ({problem}): "
                    "restore its model section, or write it again."
                )

    def dtype_of(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return these tensors; raises CheckpointError where one cannot be read."""
        tensors = {name: torch.empty(self._tensors[name].size, dtype=self.dtype_of(name)) for name in names}
        try:
            read_alone({f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, self._folder)
        except CheckpointError as error:
            raise CheckpointError(f"{self._folder} is damaged ({error}): write it again.") from None
        return tensors


def read_weights(decoder: Decoder, folder: Path) -> dict[str, Tensor]:
    """Return the full tensors of a decoder on the CPU; no other rank takes part. Raises as `load_weights` does."""
    stored, shapes = StoredWeights(folder), decoder.shapes()
    stored.check(shapes)
    _check_all_used(folder, shapes)
    tensors = stored.read(shapes)
    _check_values(folder, tensors, tied=decoder.model.tied_embeddings)
    return tensors


def save_weights(
    tensors: Mapping[str, Tensor], folder: Path, decoder: Decoder | None = None, files: Files | None = None
) -> None:
    """Write full tensors, what they belong to and the files of the model that they came from, from a single rank.

    Raises CheckpointError where `folder` exists or cannot be written.
    """
    with new_folder(folder) as partial:
        try:
            written = write_shards({"model": tensors}, partial)
        except CheckpointError as error:
            raise CheckpointError(_not_written(folder, str(error))) from None
        if decoder is not None:
            (partial / DECODER_FILE).write_text(decoder.text())
        write_files(files or {}, partial)
        Manifest.of_files(partial, written).write(partial)


def check_absent(folder: Path) -> None:
    """Raise CheckpointError where `folder` exists; for commands that read for long before they write."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists already: name another folder, or delete it.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into; it becomes `folder` at the end of the block.

    Raises CheckpointError where `folder` exists or cannot be written, and leaves nothing then.
    """
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(_not_written(folder, error.strerror or str(error))) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _not_written(folder: Path, cause: str) -> str:
    return f"{folder} cannot be written ({cause}): make room, or name another folder."
