"""Text to token ids: the built-in byte tokenizer and Hugging Face `tokenizers` files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from farspan.errors import DataError

BYTES = "bytes"
USUAL_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|end▁of▁sentence|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Turns text into token ids."""

    name: str
    """The argument of `load_tokenizer`."""
    vocabulary_size: int
    """One more than the largest id."""
    end_id: int
    """Closes a document; `encode` never returns it."""
    encode: Callable[[str], np.ndarray]
    """Returns the ids of a text, uint32 [tokens], without any end or start token."""


def load_tokenizer(name: str, *, end_token: str | None = None) -> Tokenizer:
    """Return the tokenizer `name`: "bytes" or the path of a tokenizers JSON file; raises DataError."""
    if name != BYTES:
        return _load_file(name, end_token)
    if end_token is not None:
        raise DataError(f"The tokenizer {BYTES!r} has its own end-of-document id; drop --end-token {end_token!r}.")
    return Tokenizer(name=BYTES, vocabulary_size=257, end_id=256, encode=_encode_bytes)


def _encode_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes as ids 0..255; id 256 is left for the end of a document."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


def _load_file(path: str, end_token: str | None) -> Tokenizer:
    if not Path(path).is_file():
        problem = "is a folder; pass the tokenizer.json inside it" if Path(path).is_dir() else "does not exist"
        raise DataError(f"The tokenizer file {path} {problem} (or pass --tokenizer {BYTES}).")
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"Reading the tokenizer file {path} needs the package tokenizers; "
            f"`pip install -e '.[data]'`, or pass --tokenizer {BYTES}."
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"{path} is not a tokenizers JSON file ({error}); pass a complete tokenizer.json.") from error
    # A file may set truncation and padding for its model, which would silently cut documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out a special token must not end there.
    tokenizer.encode_special_tokens = True
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    def encode(text: str) -> np.ndarray:
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the Rust side raises bare Exception, such as for a missing unknown token
            raise DataError(f"The tokenizer {path} cannot encode a document ({error}); use another.") from error
        return np.array(encoding.ids, dtype=np.uint32)

    # Ids may have holes, so the number of entries is not enough.
    size = max(vocabulary.values(), default=-1) + 1
    return Tokenizer(name=path, vocabulary_size=size, end_id=_end_id(path, vocabulary, end_token), encode=encode)


def _end_id(path: str, vocabulary: dict[str, int], end_token: str | None) -> int:
    if end_token is not None:
        if end_token not in vocabulary:
            raise DataError(f"The tokenizer {path} has no token {end_token!r}; pass another --end-token.")
        return vocabulary[end_token]
    for token in USUAL_END_TOKENS:
        if token in vocabulary:
            return vocabulary[token]
    raise DataError(
        f"The tokenizer {path} has none of the usual end-of-document tokens ({', '.join(USUAL_END_TOKENS)}); "
        "name its own with --end-token."
    )
