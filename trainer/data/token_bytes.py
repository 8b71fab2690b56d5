"""How many bytes of text each token stands for: what turns a loss in nats per token into bits per byte.

A token stands for what it adds to the decoded text inside a document: a leading space counts, a token that is part of a
character has its own bytes only, end-of-document and other special tokens have 0. Text that the tokenizer normalizes
(lower case, composed accents) counts as decoded.
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
    """Return the bytes of each token of a split, int32 [vocabulary].

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
    if not isinstance(table, np.ndarray) or table.dtype != np.int32 or table.shape != (size,) or np.any(table < 0):
        raise DataError(f"{path} is not int32 [{size}] of numbers of bytes; {ADVICE}.")
    return table


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the bytes of each token, int32 [vocabulary]; ids without a token have 0.

    Logs a line where the text of a token depends on its neighbors, so that the numbers are approximate.
    """
    if tokenizer.name == BYTES:
        return _of_bytes(tokenizer.vocabulary_size, tokenizer.end_id)
    import tokenizers  # pyright: ignore[reportMissingImports]

    file = tokenizers.Tokenizer.from_buffer(tokenizer.files[TOKENIZER_FILE])
    decoders = _decoders(json.loads(file.to_str())["decoder"])
    kinds = {decoder["type"] for decoder in decoders}
    if any(decoder["type"] == "CTC" or decoder.get("cleanup") for decoder in decoders):
        log.info("%-12sapproximate: the tokenizer's decoder joins tokens depending on their neighbors", "token bytes")
    tokens = {index: token for token, index in file.get_vocab(with_added_tokens=False).items()}
    if "ByteLevel" in kinds:
        alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        # A character for each byte; the decoder takes tokens with any other character as they are.
        sizes = {i: len(token) if alphabet.issuperset(token) else _utf8(token) for i, token in tokens.items()}
    else:
        sizes = _measured(file, tokens)
    if "ByteFallback" in kinds:
        sizes |= {index: 1 for index, token in tokens.items() if FALLBACK_BYTE.fullmatch(token)}
    # Special tokens are never made from text, see `load_tokenizer`.
    added = file.get_added_tokens_decoder().items()
    sizes |= {index: 0 if token.special else _utf8(token.content) for index, token in added}
    table = np.zeros(tokenizer.vocabulary_size, dtype=np.int32)
    table[list(sizes)] = list(sizes.values())
    table[tokenizer.end_id] = 0
    return table


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


def _measured(file: Any, tokens: dict[int, str]) -> dict[int, int]:
    """Return what each token adds between two others: decoders may strip or add spaces at the ends of a text."""
    between = next(([index] for index in tokens if file.decode([index]).isalnum()), [])
    texts = file.decode_batch([[*between, index, *between] for index in tokens])
    without = _utf8(file.decode(between * 2))
    return {index: max(_utf8(text) - without, 0) for index, text in zip(tokens, texts, strict=True)}


def _utf8(text: str) -> int:
    return len(text.encode())
