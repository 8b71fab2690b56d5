"""How many bytes of text each token stands for: what turns a loss in nats per token into bits per byte.

A token stands for what it adds to the decoded text inside a document: a leading space counts, a token that is part of a
character has its own bytes only. Special tokens, which text never contains, have none: 0, or minus the bytes that the
decoder strips where a text begins, for the one that may open a document (SentencePiece puts a space before each text).
Text that the tokenizer normalizes (lower case, composed accents) counts as decoded.
"""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from farspan.errors import DataError
from farspan.trainer.data.source import ADVICE, TokenSource, write_synced
from farspan.trainer.data.tokenizer import BYTES, TOKENIZER_FILE, Tokenizer

TOKEN_BYTES_FILE = "token_bytes.npy"
FALLBACK_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

log = logging.getLogger("farspan")


def write_token_bytes(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the table into a folder of prepared data; raises OSError."""
    table = io.BytesIO()
    np.save(table, token_bytes(tokenizer))
    write_synced(folder / TOKEN_BYTES_FILE, table.getvalue())


def read_token_bytes(source: TokenSource) -> np.ndarray | None:
    """Return the table of a split's tokens, int32 [vocabulary].

    None for other tokenizers than bytes in data that was prepared before there was such a table. Raises DataError for a
    file that is damaged.
    """
    path, size = source.folder.parent / TOKEN_BYTES_FILE, source.vocabulary_size
    if not path.is_file():
        return _of_bytes(size, source.end_id) if source.meta.tokenizer == BYTES else None
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {ADVICE}.") from None
    if not isinstance(table, np.ndarray) or table.dtype != np.int32 or table.shape != (size,):
        raise DataError(f"{path} is not int32 [{size}]; {ADVICE}.")
    return table


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the table, int32 [vocabulary]; ids without a token have 0.

    Logs a line where the text of a token depends on its neighbors, so that the numbers are approximate.
    """
    if tokenizer.name == BYTES:
        return _of_bytes(tokenizer.vocabulary_size, tokenizer.end_id)
    import tokenizers  # pyright: ignore[reportMissingImports]

    file = tokenizers.Tokenizer.from_buffer(tokenizer.files[TOKENIZER_FILE])
    content = json.loads(file.to_str())
    model, decoders = content["model"], _decoders(content["decoder"])
    kinds = {decoder["type"] for decoder in decoders}
    if any(decoder["type"] == "CTC" or decoder.get("cleanup") for decoder in decoders):
        log.info("%-12sapproximate: the tokenizer's decoder joins tokens depending on their neighbors", "token bytes")
    tokens = {index: token for token, index in file.get_vocab(with_added_tokens=False).items()}
    fallback, stripped = {}, 0
    if "ByteFallback" in kinds:
        fallback = {index: 1 for index, token in tokens.items() if FALLBACK_BYTE.fullmatch(token)}
    if "ByteLevel" in kinds:
        alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        # A character for each byte; the decoder takes tokens with any other character as they are.
        sizes = {i: len(token) if alphabet.issuperset(token) else _utf8(token) for i, token in tokens.items()}
    else:
        # A byte alone is no text that could be measured.
        sizes, stripped = _measured(file, [index for index in tokens if index not in fallback])
    sizes |= fallback | {tokenizer.end_id: -stripped}
    unknown = model.get("unk_id", file.token_to_id(model.get("unk_token") or ""))
    for index, token in file.get_added_tokens_decoder().items():
        # Special tokens are never made from text, see `load_tokenizer`, but the unknown one is.
        of_special = 0 if index == unknown else -stripped
        sizes[index] = of_special if token.special else _utf8(token.content)
    table = np.zeros(tokenizer.vocabulary_size, dtype=np.int32)
    table[list(sizes)] = list(sizes.values())
    return table


def count_bytes(table: np.ndarray, labels: np.ndarray, before: np.ndarray) -> int:
    """Return the bytes of text of some labels, all int [vocabulary].

    labels: how often each token is one. before: how often each token is followed by one.
    """
    return int(labels @ table.clip(min=0) + before @ table.clip(max=0))


def _of_bytes(vocabulary_size: int, end_id: int) -> np.ndarray:
    table = np.ones(vocabulary_size, dtype=np.int32)
    table[end_id] = 0
    return table


def _decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a decoder of a tokenizers file, or those of a sequence."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _decoders(inner)]


def _measured(file: Any, tokens: list[int]) -> tuple[dict[int, int], int]:
    """Return what each token adds between two others, and how much less the first of a text may add.

    Decoders may strip or add spaces at the ends of a text.
    """
    between = next(([index] for index in tokens if file.decode([index]).isalnum()), [])
    inside = file.decode_batch([[*between, index, *between] for index in tokens])
    first = file.decode_batch([[index, *between] for index in tokens])
    one, two = _utf8(file.decode(between)), _utf8(file.decode(between * 2))
    sizes = {index: max(_utf8(text) - two, 0) for index, text in zip(tokens, inside, strict=True)}
    # Between two others, `between` itself may begin with a space.
    at_start = {index: _utf8(text) - (two - one) for index, text in zip(tokens, first, strict=True)}
    return sizes, max((sizes[index] - at_start[index] for index in tokens), default=0)


def _utf8(text: str) -> int:
    return len(text.encode())
