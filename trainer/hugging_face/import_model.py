"""Import of a Hugging Face model as weights that a run can start from."""

from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import CheckpointError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.hugging_face.architectures import Architecture
from farspan.trainer.hugging_face.read_config import read_config
from farspan.trainer.hugging_face.tensor_files import TensorFiles
from farspan.trainer.weights.io import save_weights
from farspan.trainer.weights.locate import DECODER_FILE, Decoder

DERIVED = "rotary_emb.inv_freq"
"""Tensors of older versions of transformers that follow from the configuration."""
ROUTER_BIAS = "feed_forward.bias"
"""Suffix of the only buffers of a decoder, which these architectures lack."""


def import_model(folder: Path, out: Path) -> Decoder:
    """Write the model in `folder` as weights with a `model.toml`, in the dtype that it is stored in.

    Raises ConfigError for a model that farspan does not compute, CheckpointError for incomplete files.
    """
    architecture, model = read_config(folder)
    decoder, files = Decoder(model=model), TensorFiles(folder)
    tensors, used = {}, set()
    for name, shape in decoder.shapes().items():
        if name.endswith(ROUTER_BIAS):
            tensors[name] = torch.zeros(shape)
            continue
        # Tied embeddings are one table, stored once.
        stored_name = "embedding.weight" if model.tied_embeddings and name == "head.weight" else name
        sources = _sources(stored_name, architecture, files, model.experts.count)
        tensors[name] = _parameter(stored_name, sources, files, shape, folder)
        used |= set(sources)
    _check_all_used(files, used, architecture, folder, tied=model.tied_embeddings)
    with connected(Ranks(), torch.device("cpu")):
        save_weights(tensors, out, {DECODER_FILE: decoder.text()})
    return decoder


def _sources(name: str, architecture: Architecture, files: TensorFiles, experts: int) -> list[str]:
    """Return the tensors of a parameter, in the layout of these files."""
    published = architecture.tensors_of(name, experts)
    fused = architecture.fused_tensor_of(name)
    if fused is not None and published[0] not in files and fused.tensor in files:
        return [fused.tensor]
    return published


def _parameter(name: str, sources: list[str], files: TensorFiles, shape: torch.Size, folder: Path) -> Tensor:
    parts = [files.tensor(source) for source in sources]
    fused = Architecture.fused_tensor_of(name)
    if fused is not None and fused.tensor == sources[0] and fused.half is not None:
        both = torch.Size((shape[0], 2 * shape[1], shape[2]))
        _check_shape(parts[0], both, sources[0], folder)
        return parts[0].chunk(2, dim=1)[fused.half]  # [E, 2 * F, C] -> [E, F, C]
    # Matrices of experts are stacked to one parameter, E x [out, in] -> [E, out, in]; other parameters are one tensor.
    stacked = len(shape) == 3 and parts[0].dim() == 2
    for source, part in zip(sources, parts, strict=True):
        _check_shape(part, shape[1:] if stacked else shape, source, folder)
    return torch.stack(parts) if stacked else parts[0]


def _check_shape(tensor: Tensor, shape: torch.Size, name: str, folder: Path) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{folder} has {name} of shape {list(tensor.shape)}, not {list(shape)} as in its config.json: download or "
            "save the model again."
        )


def _check_all_used(
    files: TensorFiles, used: set[str], architecture: Architecture, folder: Path, *, tied: bool
) -> None:
    for name in files.names:
        if name in used or name.endswith(DERIVED) or (tied and name == "lm_head.weight"):
            continue
        raise CheckpointError(
            f"{folder} has {name}, which is not in {architecture.name} as its config.json describes it: farspan would "
            "compute another model; import a model without it."
        )
