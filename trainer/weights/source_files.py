"""The files that weights keep of the model that they came from, unchanged, so that an export can write them back.

    hugging_face/   config.json generation_config.json tokenizer.json …   as in the folder of the model
                    tensors.json          dtype of each tensor there, by its name
                    derived.safetensors   tensors there that follow from the configuration
                    model.toml            the decoder that the import made of it
                    manifest.json         hashes of these files
The folder lies in imported weights, and is copied into the folder of each run that starts from them. The folder of any
other run has the tokenizer of its data only.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from farspan.errors import ConfigError
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.checkpoint.verify import check_complete
from farspan.trainer.data.source import META_FILE, SPLITS, TokenSource
from farspan.trainer.data.tokenizer import BYTES, TOKENIZER_FILE
from farspan.trainer.data.tokenizer_files import contents, files_beside_split, has_ids_of

FOLDER = "hugging_face"
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
DTYPES_FILE, DERIVED_FILE, DECODER_FILE = "tensors.json", "derived.safetensors", "model.toml"
OURS = {DTYPES_FILE, DERIVED_FILE, DECODER_FILE}
TOKENIZER_PATTERNS = (
    "tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip

log = logging.getLogger("farspan")

Files = Mapping[str, bytes]
"""Content of files by name, relative to their folder."""


def files_of_model(folder: Path) -> dict[str, bytes]:
    """Return the files of a Hugging Face model but its tensors."""
    patterns = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_PATTERNS)
    return contents(folder, {path for pattern in patterns for path in folder.glob(pattern)})


def tokenizer_files(files: Files) -> dict[str, bytes]:
    return {name: files[name] for name in files if name not in {CONFIG_FILE, GENERATION_FILE, *OURS}}


def files_beside(weights: Path) -> dict[str, bytes]:
    """Return what is kept with weights or, for one of its checkpoints, with a run; empty where nothing is.

    Raises DamagedError where a file is not as it was written.
    """
    folder = weights / FOLDER
    if not folder.is_dir() and weights.absolute().parent.name == "checkpoints":
        folder = weights.absolute().parent.parent / FOLDER
    if not folder.is_dir():
        return {}
    return {name: (folder / name).read_bytes() for name in check_complete(folder).files}


def write_files(files: Files, parent: Path) -> None:
    """Keep these files in `parent`, in place of any that it has; raises OSError."""
    folder, partial = parent / FOLDER, parent / f".{FOLDER}.partial"
    for old in (folder, partial):
        shutil.rmtree(old, ignore_errors=True)
    if not files:
        return
    partial.mkdir(parents=True)
    for name, content in files.items():
        path = partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    Manifest.of_files(partial, {}).write(partial)
    partial.rename(folder)


def keep_in_run(start_from: Path | None, data: Path, run: Path) -> None:
    """Copy what is kept with the weights that a run starts from into its folder, or else its data's tokenizer.

    Raises CheckpointError or DataError for a file that is not as it was written, OSError where the folder cannot be.
    """
    files = files_beside(start_from) if start_from is not None else {}
    write_files(files | (tokenizer_files(files) or files_of_data(data)), run)


def files_of_data(data: Path) -> dict[str, bytes]:
    """Return the tokenizer's files in prepared data, none where they or the data are absent; raises DataError."""
    split = data / SPLITS[0]
    return files_beside_split(TokenSource(split)) if (split / META_FILE).is_file() else {}


def check_tokenizer(weights: Path, data: Path) -> None:
    """Raise ConfigError where prepared data has other token ids than weights (see `files_beside`) were trained with.

    Files with another hash are compared by what decides about ids. Older data and weights cannot be compared.
    """
    kept = files_beside(weights).get(TOKENIZER_FILE)
    if kept is None:
        return
    split = TokenSource(data / SPLITS[0])
    if split.meta.tokenizer == BYTES:
        log.warning(
            "warning     data.folder=%s has bytes as tokens, the weights in %s were trained with their %s",
            data, weights, TOKENIZER_FILE,
        )  # fmt: skip
    elif not has_ids_of(split, kept):
        raise ConfigError(
            f"data.folder={str(data)!r} was prepared with another {TOKENIZER_FILE} than the weights in {weights} were "
            f"trained with: prepare it with theirs, in {FOLDER}/, or import the model again from a folder with the "
            f"data's {TOKENIZER_FILE}."
        )
