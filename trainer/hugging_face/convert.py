"""Between Hugging Face and weights of farspan: import of a model for a run to start from, export of a trained one."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from farspan.errors import CheckpointError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.config import Config
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.hugging_face.architectures import Architecture, architecture_of
from farspan.trainer.hugging_face.config_json import CONFIG_FILE, config_fields, read_config
from farspan.trainer.hugging_face.tensor_files import TensorFiles, write_tensors
from farspan.trainer.weights.io import Decoder, StoredWeights, find_trained_model, new_folder, save_weights

FILE_BYTES = 5_000_000_000
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
        save_weights(tensors, out, decoder)
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


def export_model(
    source: Path, out: Path, *, dtype: torch.dtype | None = None, file_bytes: int = FILE_BYTES
) -> Architecture:
    """Write the model in `source` (see `find_trained_model`) for `AutoModelForCausalLM.from_pretrained` to load.

    dtype: of what is written; as stored by default. Raises ConfigError where no architecture computes the model.
    """
    trained = find_trained_model(source)
    model, rope = trained.decoder.model, trained.decoder.model.rope
    architecture = architecture_of(model, trained.decoder.mechanisms())
    stored, shapes = StoredWeights(trained.weights), trained.decoder.shapes()
    stored.check(shapes)
    parts = dict(_parts(shapes, architecture, tied=model.tied_embeddings))
    sizes = {
        # [E, out, in] -> [out, in] for the matrix of one expert
        name: shapes[parameter][len(index) :].numel() * (dtype or stored.dtype_of(parameter)).itemsize
        for name, (parameter, index) in parts.items()
    }

    def read(names: list[str]) -> Mapping[str, Tensor]:
        tensors = stored.read({parts[name][0] for name in names})
        return {name: tensors[parameter][index].to(dtype) for name in names for parameter, index in [parts[name]]}

    fields = config_fields(
        model,
        architecture,
        # That of the run, or else of the rotary embedding.
        positions=trained.run.data.sequence_tokens if trained.run else round(rope.original_positions * rope.factor),
        dtype=str(dtype or stored.dtype_of("embedding.weight")).removeprefix("torch."),
        end_id=_end_id(trained.run),
    )
    with connected(Ranks(), torch.device("cpu")), new_folder(out) as partial:
        _check_biases(stored, shapes, source)
        write_tensors(sizes, read, partial, file_bytes=file_bytes)
        (partial / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    return architecture


def _parts(
    shapes: Mapping[str, torch.Size], architecture: Architecture, *, tied: bool
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield each tensor of Hugging Face with its parameter and, for the matrix of one expert, its index in it.

    A tied table is written once.
    """
    for name, shape in shapes.items():
        if name.endswith(ROUTER_BIAS) or (tied and name == "head.weight"):
            continue
        stacked = len(shape) == 3
        for number, tensor in enumerate(architecture.tensors_of(name, shape[0])):
            yield tensor, (name, (number,) if stacked else ())


def _check_biases(stored: StoredWeights, shapes: Mapping[str, torch.Size], source: Path) -> None:
    """Refuse routers with biases, which a run may have loaded even if its own `bias_rate` is 0."""
    for name, bias in stored.read(name for name in shapes if name.endswith(ROUTER_BIAS)).items():
        if bias.any():
            raise CheckpointError(
                f"{source} has biases of experts ({name}), which routers of Hugging Face lack: export a model that was "
                "trained with model.experts.bias_rate=0 from the start."
            )


def _end_id(run: Config | None) -> int | None:
    """Return the end-of-document token of the run's data, None without the data."""
    if run is None or not (run.data.folder / SPLITS[0] / META_FILE).is_file():
        return None
    return TokenSource(run.data.folder / SPLITS[0]).end_id
