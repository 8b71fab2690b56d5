"""Export of a trained model to a folder that `AutoModelForCausalLM.from_pretrained` of transformers loads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.errors import CheckpointError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.config import Config
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.hugging_face.architectures import Architecture, architecture_of
from farspan.trainer.hugging_face.import_model import ROUTER_BIAS
from farspan.trainer.hugging_face.read_config import CONFIG_FILE
from farspan.trainer.hugging_face.tensor_files import write_tensors
from farspan.trainer.hugging_face.write_config import config_fields
from farspan.trainer.weights.io import StoredWeights, new_folder
from farspan.trainer.weights.locate import TrainedModel, find_trained_model

FILE_BYTES = 5_000_000_000


class _Part(NamedTuple):
    """A parameter of farspan or, with `expert`, the matrix of one expert in it."""

    parameter: str
    expert: int | None

    def shape(self, shapes: Mapping[str, torch.Size]) -> torch.Size:
        # [E, out, in] -> [out, in]
        return shapes[self.parameter] if self.expert is None else shapes[self.parameter][1:]

    def take(self, parameters: Mapping[str, Tensor]) -> Tensor:
        tensor = parameters[self.parameter]
        return tensor if self.expert is None else tensor[self.expert]


def export_model(
    source: Path, out: Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> Architecture:
    """Write the model in `source` (see `find_trained_model`) in `dtype`, or as stored; return its architecture.

    Raises ConfigError for a model without an architecture of Hugging Face.
    """
    trained = find_trained_model(source)
    model = trained.decoder.model
    architecture = architecture_of(model, trained.decoder.mechanisms())
    stored, shapes = StoredWeights(trained.weights), trained.decoder.shapes()
    stored.check(shapes)
    parts = dict(_parts(shapes, architecture, tied=model.tied_embeddings))
    sizes = {
        name: part.shape(shapes).numel() * (dtype or stored.dtype_of(part.parameter)).itemsize
        for name, part in parts.items()
    }

    def read(names: list[str]) -> Mapping[str, Tensor]:
        tensors = stored.read({parts[name].parameter for name in names})
        return {name: parts[name].take(tensors).to(dtype) for name in names}

    fields = config_fields(
        model,
        architecture,
        positions=_positions(trained),
        dtype=str(dtype or stored.dtype_of("embedding.weight")).removeprefix("torch."),
        end_id=_end_id(trained.run),
    )
    with connected(Ranks(), torch.device("cpu")), new_folder(out) as partial:
        _check_biases(stored, shapes, source)
        write_tensors(sizes, read, partial, file_bytes=file_bytes)
        (partial / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    return architecture


def _parts(shapes: Mapping[str, torch.Size], architecture: Architecture, *, tied: bool) -> Iterator[tuple[str, _Part]]:
    """Yield each tensor of Hugging Face with its part of a parameter; a tied table is written once."""
    for name, shape in shapes.items():
        if name.endswith(ROUTER_BIAS) or (tied and name == "head.weight"):
            continue
        stacked = len(shape) == 3
        for number, tensor in enumerate(architecture.tensors_of(name, shape[0])):
            yield tensor, _Part(name, number if stacked else None)


def _check_biases(stored: StoredWeights, shapes: Mapping[str, torch.Size], source: Path) -> None:
    """Refuse routers with biases, which a run may have loaded even if its own `bias_rate` is 0."""
    for name, bias in stored.read(name for name in shapes if name.endswith(ROUTER_BIAS)).items():
        if bias.any():
            raise CheckpointError(
                f"{source} has biases of experts ({name}), which routers of Hugging Face lack: export a model that was "
                "trained with model.experts.bias_rate=0 from the start."
            )


def _positions(trained: TrainedModel) -> int:
    """Return the context length of the model: that of the run, or else of its rotary embedding."""
    rope = trained.decoder.model.rope
    return trained.run.data.sequence_tokens if trained.run else round(rope.original_positions * rope.factor)


def _end_id(run: Config | None) -> int | None:
    """Return the end-of-document token of the run's data, None without the data."""
    if run is None or not (run.data.folder / SPLITS[0] / META_FILE).is_file():
        return None
    return TokenSource(run.data.folder / SPLITS[0]).end_id
