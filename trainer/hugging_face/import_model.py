"""Import of a Hugging Face model as weights that a run can start from."""

from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import CheckpointError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.hugging_face.architectures import Architecture
from farspan.trainer.hugging_face.config_json import read_config
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
        tensors[name], sources = _parameter(stored_name, shape, architecture, files)
        used |= set(sources)
    for name in files.names:
        if not (name in used or name.endswith(DERIVED) or (model.tied_embeddings and name == "lm_head.weight")):
            raise CheckpointError(
                f"{folder} has {name}, which is not in {architecture.name} as its config.json describes it: farspan "
                "would compute another model; import a model without it."
            )
    with connected(Ranks(), torch.device("cpu")):
        save_weights(tensors, out, {DECODER_FILE: decoder.text()})
    return decoder


def _parameter(
    name: str, shape: torch.Size, architecture: Architecture, files: TensorFiles
) -> tuple[Tensor, list[str]]:
    """Return a parameter and the tensors that it was made of, in the layout of these files."""
    sources, fused = architecture.tensors_of(name, shape[0]), architecture.fused_tensor_of(name)
    if fused is not None and sources[0] not in files and fused.tensor in files:
        if fused.half is None:
            return files.tensor(fused.tensor, shape), [fused.tensor]
        both = files.tensor(fused.tensor, torch.Size((shape[0], 2 * shape[1], shape[2])))
        return both.chunk(2, dim=1)[fused.half], [fused.tensor]  # [E, 2 * F, C] -> [E, F, C]
    if len(shape) == 3:
        # E x [out, in] -> [E, out, in]
        return torch.stack([files.tensor(source, shape[1:]) for source in sources]), sources
    return files.tensor(sources[0], shape), sources
