"""Between Hugging Face and weights of farspan: import of a model for a run to start from, export of a trained one."""

import json
import logging
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farspan.errors import CheckpointError, ConfigError
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.hugging_face.architectures import (
    OUTSIDE_OF_BLOCKS,
    PLUG_IN,
    Architecture,
    architecture_of,
)
from farspan.trainer.hugging_face.config_json import (
    architecture_in,
    config_fields,
    read_config,
    read_json,
    with_changes,
)
from farspan.trainer.hugging_face.tensor_files import (
    TensorFiles,
    are_equal,
    converted,
    from_bytes,
    name_of,
    to_bytes,
    write_tensors,
)
from farspan.trainer.toml_config import from_tree
from farspan.trainer.weights.io import (
    EMBEDDING,
    HEAD,
    Decoder,
    StoredWeights,
    TrainedModel,
    check_absent,
    find_trained_model,
    new_folder,
    save_weights,
)
from farspan.trainer.weights.source_files import (
    CONFIG_FILE,
    DECODER_FILE,
    DERIVED_FILE,
    DTYPES_FILE,
    GENERATION_FILE,
    Files,
    files_beside,
    files_of_data,
    files_of_model,
    tokenizer_files,
)

FILE_BYTES = 5_000_000_000
DERIVED = "rotary_emb.inv_freq"
"""Tensors of older versions of transformers that follow from the configuration."""
ROUTER_BIAS = "feed_forward.bias"
"""Suffix of the only buffers of a decoder, which these architectures lack."""

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The Hugging Face model that weights came from: its config.json, the decoder that import made of it, its tensors.

    dtypes: of each tensor of its files, by name. derived: tensors that follow from its configuration.
    """

    fields: dict[str, Any]
    decoder: Decoder
    dtypes: dict[str, str]
    derived: dict[str, Tensor]

    @classmethod
    def of(cls, files: Files) -> "Origin | None":
        """Return None for the files of a run that did not start from such a model."""
        if CONFIG_FILE not in files:
            return None
        return cls(
            fields=json.loads(files[CONFIG_FILE]),
            decoder=from_tree(Decoder, tomllib.loads(files[DECODER_FILE].decode())),
            dtypes=json.loads(files[DTYPES_FILE]),
            derived=from_bytes(files[DERIVED_FILE]) if DERIVED_FILE in files else {},
        )

    @property
    def architecture(self) -> Architecture:
        return architecture_in(self.fields)

    @property
    def positions(self) -> int:
        default = self.architecture.defaults["max_position_embeddings"]
        return self.fields.get("max_position_embeddings", default)


def import_model(folder: Path, out: Path, *, dtype: torch.dtype | None = None) -> Decoder:
    """Write the model in `folder` as weights with a `model.toml`; see `read_model`."""
    check_absent(out)
    decoder, tensors, beside = read_model(folder, dtype=dtype)
    with connected(Ranks(), torch.device("cpu")):
        save_weights(tensors, out, decoder, beside)
    return decoder


def is_model(folder: Path) -> bool:
    """Return whether a folder is one of Hugging Face rather than weights of farspan."""
    return (folder / CONFIG_FILE).is_file() and not (folder / DECODER_FILE).is_file()


def read_model(folder: Path, *, dtype: torch.dtype | None = None) -> tuple[Decoder, dict[str, Tensor], Files]:
    """Return the model in `folder`: its decoder, its tensors, as stored or in `dtype`, and the files to keep with them.

    Raises ConfigError for a model that farspan does not compute, or numbers that `dtype` cannot hold, CheckpointError
    for incomplete files.
    """
    architecture, decoder = read_config(folder)
    files = TensorFiles(folder, dtype)
    decoder = _as_tied_as_the_file(decoder, files, folder)
    tied, tensors, used = decoder.model.tied_embeddings, {}, set()
    for name, shape in decoder.shapes().items():
        if name.endswith(ROUTER_BIAS):
            tensors[name] = torch.zeros(shape)
            continue
        # Tied embeddings are one table, under either name.
        table = EMBEDDING if OUTSIDE_OF_BLOCKS[EMBEDDING] in files else HEAD
        stored_name = table if tied and name in (EMBEDDING, HEAD) else name
        tensors[name], sources = _parameter(stored_name, shape, architecture, files)
        used |= set(sources)
    derived = {name: files.raw(name) for name in files.names if name.endswith(DERIVED)}
    for name in files.names:
        if not (name in used or name in derived or (tied and name == OUTSIDE_OF_BLOCKS[HEAD])):
            raise CheckpointError(
                f"{folder} has {name}, which is not in {architecture.name} as its config.json describes it: farspan "
                "would compute another model; import a model without it."
            )
    beside = files_of_model(folder)
    read_json(folder / GENERATION_FILE, beside.get(GENERATION_FILE, b"{}"))
    beside |= {DTYPES_FILE: json.dumps(files.dtypes, indent=1).encode(), DECODER_FILE: decoder.text().encode()}
    if derived:
        beside[DERIVED_FILE] = to_bytes(derived)
    return decoder, tensors, beside


def _as_tied_as_the_file(decoder: Decoder, files: TensorFiles, folder: Path) -> Decoder:
    """As transformers does, tie embeddings unless the file has two tables that differ."""
    model, table, head = decoder.model, OUTSIDE_OF_BLOCKS[EMBEDDING], OUTSIDE_OF_BLOCKS[HEAD]
    if not model.tied_embeddings:
        if head not in files:
            raise CheckpointError(
                f"{folder} has no tensor {head}, but tie_word_embeddings=false in its config.json: set that to true if "
                f"{table} is the output head, or save the model again."
            )
        return decoder
    if table not in files or head not in files:
        return decoder
    shape = torch.Size((model.vocabulary_size, model.width))
    if are_equal(files.tensor(table, shape), files.tensor(head, shape)):
        return decoder
    log.info(
        "%-12s%s differs from %s: imported with model.tied_embeddings=false, as transformers loads it, although "
        "config.json has tie_word_embeddings=true", "untied", head, table,
    )  # fmt: skip
    return replace(decoder, model=replace(model, tied_embeddings=False))


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
        matrices = [files.tensor(source, shape[1:]) for source in sources]
        for source, matrix in zip(sources, matrices, strict=True):
            if matrix.dtype != matrices[0].dtype:
                raise ConfigError(
                    f"{source} is in {matrix.dtype} and {sources[0]} in {matrices[0].dtype}, but farspan stores the "
                    "experts of a layer together: import with --dtype float32 or another."
                )
        return torch.stack(matrices), sources  # E x [out, in] -> [E, out, in]
    return files.tensor(sources[0], shape), sources


def export_model(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    as_dense: bool = False,
    file_bytes: int = FILE_BYTES,
) -> Architecture:
    """Write the model in `source` (see `find_trained_model`) for `AutoModelForCausalLM.from_pretrained` to load.

    A model that was imported has the names, the other files and the unknown fields of its config.json again.
    dtype: of what is written; as stored by default. as_dense: with dense attention, whatever it was trained with.
    Raises ConfigError where no architecture computes the model, or `dtype` cannot hold its numbers.
    """
    trained = find_trained_model(source)
    dense = replace(trained.decoder, attention=AttentionConfig())
    _check_has_weights_of(dense, trained.decoder)
    if as_dense:
        trained = replace(trained, decoder=dense)
    decoder, files = trained.decoder, files_beside(trained.weights)
    origin = Origin.of(files)
    architecture = architecture_of(decoder.model, decoder.mechanisms(), origin.architecture if origin else None)
    stored, shapes = StoredWeights(trained.weights), decoder.shapes()
    stored.check(shapes)
    unused = next((name for name in stored.names if name not in shapes), None)
    if unused is not None:
        raise ConfigError(f"{source} has {unused}, which is not in {architecture.name}: the model cannot be exported.")
    parts = _parts(shapes, architecture, origin.dtypes if origin else {}, tied=decoder.model.tied_embeddings)
    derived = origin.derived if origin and origin.decoder.model.rope == decoder.model.rope else {}
    dtypes = {name: dtype or stored.dtype_of(made_of[0][0]) for name, made_of in parts.items()}
    # [E, out, in] -> [out, in] for the matrix of one expert
    sizes = {
        name: sum(shapes[parameter][len(index) :].numel() for parameter, index in made_of) * dtypes[name].itemsize
        for name, made_of in parts.items()
    } | {name: tensor.nbytes for name, tensor in derived.items()}

    def read(names: list[str]) -> Mapping[str, Tensor]:
        tensors = stored.read({parameter for name in names if name in parts for parameter, _ in parts[name]})
        read = {name: derived[name] for name in names if name in derived}
        for name in names:
            if name in parts:
                halves = [tensors[parameter][index] for parameter, index in parts[name]]
                whole = halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)  # 2 x [E, F, C] -> [E, 2 * F, C]
                read[name] = converted(whole, name, dtype, source)
        return read

    beside = _beside(trained, architecture, origin, files, {name: name_of(dtypes[name]) for name in dtypes})
    with connected(Ranks(), torch.device("cpu")), new_folder(out) as partial:
        _check_biases(stored, shapes, source)
        write_tensors(sizes, read, partial, file_bytes=file_bytes)
        for name, content in beside.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
    return architecture


def _parts(
    shapes: Mapping[str, torch.Size], architecture: Architecture, layout: Container[str], *, tied: bool
) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return each tensor of Hugging Face with its parameters and, for the matrix of one expert, its index in it.

    layout: tensors of the files that the model came from. Where it does not say otherwise, a tied table is written
    once, and experts one by one; gates and up-projections are stacked in one tensor where it does.
    """
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    head_alone = OUTSIDE_OF_BLOCKS[HEAD] in layout and OUTSIDE_OF_BLOCKS[EMBEDDING] not in layout
    for name, shape in shapes.items():
        left_out = (name == HEAD and OUTSIDE_OF_BLOCKS[HEAD] not in layout) or (name == EMBEDDING and head_alone)
        if name.endswith(ROUTER_BIAS) or (tied and left_out):
            continue
        fused = architecture.fused_tensor_of(name)
        if fused is not None and fused.tensor in layout:
            # The model has gates before up-projections, too.
            parts.setdefault(fused.tensor, []).append((name, ()))
            continue
        stacked = len(shape) == 3
        for number, tensor in enumerate(architecture.tensors_of(name, shape[0])):
            parts[tensor] = [(name, (number,) if stacked else ())]
    return parts


def _beside(
    trained: TrainedModel, architecture: Architecture, origin: Origin | None, files: Files, dtypes: Mapping[str, str]
) -> dict[str, bytes]:
    """Return the files that an export has beside its tensors, and log what was chosen for them.

    dtypes: of the tensors that are written.
    """
    end_id = _end_id(trained.run)
    fields = _config_fields(trained, architecture, origin, end_id, dtypes)
    beside = {CONFIG_FILE: (json.dumps(fields, indent=2) + "\n").encode()}
    if GENERATION_FILE in files:
        beside[GENERATION_FILE] = files[GENERATION_FILE]
        generation = json.loads(files[GENERATION_FILE])
        end = _with_end(generation.get("eos_token_id"), end_id)
        if generation.get("eos_token_id", end) != end:
            beside[GENERATION_FILE] = (json.dumps(generation | {"eos_token_id": end}, indent=2) + "\n").encode()
    tokenizer = tokenizer_files(files) or (files_of_data(trained.run.data.folder) if trained.run else {})
    names = ", ".join(sorted(tokenizer)) or "none is known: copy its files there yourself"
    log.info("%-12s%s", "tokenizer", names)
    return beside | tokenizer


def _config_fields(
    trained: TrainedModel,
    architecture: Architecture,
    origin: Origin | None,
    end_id: int | None,
    dtypes: Mapping[str, str],
) -> dict[str, Any]:
    """Return the fields of `config.json`; log its number of positions and the tokens that end a document."""
    decoder, positions = trained.decoder, _positions(trained, origin)
    fields = config_fields(decoder, architecture)
    if origin is None:
        # Documents do not start with a token here; without the field, transformers takes Llama's.
        fields |= {"bos_token_id": None, "eos_token_id": None}
    else:
        before = config_fields(origin.decoder, origin.architecture)
        # Some forms of RoPE depend on the number of positions.
        fields = with_changes(origin.fields, before, fields, rope_changed=positions != origin.positions)
        if trained.run is not None and fields.get("tie_word_embeddings"):
            # The file had two tables all the same.
            fields["tie_word_embeddings"] = decoder.model.tied_embeddings
    if origin is None or positions != origin.positions:
        fields["max_position_embeddings"] = positions
    if end_id is not None:
        fields["eos_token_id"] = _with_end(fields.get("eos_token_id"), end_id)
    if origin is None or any(origin.dtypes.get(name) != dtype for name, dtype in dtypes.items()):
        written = next(dtypes[name] for name in OUTSIDE_OF_BLOCKS.values() if name in dtypes)
        # Versions 5 of transformers write the first, earlier ones read the second.
        fields |= dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in fields] or ["torch_dtype"], written)
    if PLUG_IN in fields:
        log.info(
            "%-12s%s by farspan.integrations.transformers, without which transformers refuses to load the model",
            "attention", fields[PLUG_IN]["mechanism"],
        )  # fmt: skip
    sequences = f", trained on sequences of {trained.run.data.sequence_tokens:,}" if trained.run else ""
    kept = ", as in the imported model" if origin and positions == origin.positions else ""
    log.info("%-12smax_position_embeddings=%d%s%s", "context", positions, kept, sequences)
    missing = f", as data.folder={trained.run.data.folder} is not there" if trained.run and end_id is None else ""
    log.info("%-12seos_token_id=%s%s", "end", json.dumps(fields.get("eos_token_id")), missing)
    return fields


def _positions(trained: TrainedModel, origin: Origin | None) -> int:
    """Return the most of what is known: positions of the imported model, of the run and of a scaled RoPE."""
    rope, known = trained.decoder.model.rope, []
    if origin is not None:
        known.append(origin.positions)
    if trained.run is not None:
        known.append(trained.run.data.sequence_tokens)
    is_scaled = rope.scaling != "none" and (origin is None or rope != origin.decoder.model.rope)
    if is_scaled or not known:
        known.append(round(rope.original_positions * rope.factor))
    return max(known)


def _check_has_weights_of(dense: Decoder, decoder: Decoder) -> None:
    """Refuse routers and gated recurrences: no architecture has weights for them, with any attention."""
    theirs = dense.shapes()
    for name, shape in decoder.shapes().items():
        if theirs.get(name) != shape:
            raise ConfigError(
                f"attention.mechanism={decoder.attention.mechanism!r} gives the model {name} of shape {list(shape)}, "
                "which dense attention does not have, so that no architecture of Hugging Face computes it: export a "
                "model whose mechanism adds no weights, such as moba."
            )


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


def _with_end(given: int | list[int] | None, end_id: int | None) -> int | list[int] | None:
    """Return `eos_token_id` with the token that ended the documents of a training."""
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if end_id is None or end_id in ids:
        return given
    return [*ids, end_id] if ids else end_id
