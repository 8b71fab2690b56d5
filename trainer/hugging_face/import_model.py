"""A model of Hugging Face as weights that a run can begin with."""

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
"""What files of older versions of transformers hold besides parameters: it follows from their configuration."""
ROUTER_BIAS = "feed_forward.bias"
"""The end of the name of our only buffers, which these architectures have not."""


def import_model(folder: Path, out: Path) -> Decoder:
    """Write the model in `folder` as weights, in the dtype that it is stored in, beside their `model.toml`.

    Raises ConfigError for a model that we have no decoder for, CheckpointError where its files are not whole.
    """
    architecture, model = read_config(folder)
    decoder, files = Decoder(model=model), TensorFiles(folder)
    tensors, used = {}, set()
    for name, shape in decoder.shapes().items():
        if name.endswith(ROUTER_BIAS):
            tensors[name] = torch.zeros(shape)
            continue
        # With tied embeddings both names are of one table, and files hold it once.
        of_table = "embedding.weight" if model.tied_embeddings and name == "head.weight" else name
        names = _sources(of_table, architecture, files, model.experts.count)
        tensors[name] = _parameter(of_table, names, files, shape, folder)
        used |= set(names)
    _check_all_used(files, used, architecture, folder, tied=model.tied_embeddings)
    with connected(Ranks(), torch.device("cpu")):
        save_weights(tensors, out, {DECODER_FILE: decoder.text()})
    return decoder


def _sources(name: str, architecture: Architecture, files: TensorFiles, experts: int) -> list[str]:
    """Return the tensors that a parameter is made of, in the layout that these files have."""
    published = architecture.tensors_of(name, experts)
    fused = architecture.fused_tensor_of(name)
    if fused is not None and published[0] not in files and fused.tensor in files:
        return [fused.tensor]
    return published


def _parameter(name: str, sources: list[str], files: TensorFiles, shape: torch.Size, folder: Path) -> Tensor:
    parts = [files.tensor(source) for source in sources]
    fused = Architecture.fused_tensor_of(name)
    if fused is not None and fused.tensor == sources[0] and fused.number is not None:
        whole = torch.Size((shape[0], 2 * shape[1], shape[2]))
        _check_shape(parts[0], whole, sources[0], folder)
        return parts[0].chunk(2, dim=1)[fused.number]
    # Experts stacked are one parameter; all others are a tensor of their own.
    stacked = len(shape) == 3 and parts[0].dim() == 2
    for source, part in zip(sources, parts, strict=True):
        _check_shape(part, shape[1:] if stacked else shape, source, folder)
    return torch.stack(parts) if stacked else parts[0]


def _check_shape(tensor: Tensor, shape: torch.Size, name: str, folder: Path) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{folder} has {name} of shape {list(tensor.shape)}, and its config.json makes it {list(shape)}: download "
            "or save the model again."
        )


def _check_all_used(
    files: TensorFiles, used: set[str], architecture: Architecture, folder: Path, *, tied: bool
) -> None:
    for name in files.names:
        if name in used or name.endswith(DERIVED) or (tied and name == "lm_head.weight"):
            continue
        raise CheckpointError(
            f"{folder} has {name}, which {architecture.name} has no place for by its config.json: it is part of "
            "what the model computes, so take another."
        )
