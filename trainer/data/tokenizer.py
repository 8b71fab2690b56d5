"""Text to token ids: the built-in byte tokenizer and Hugging Face `tokenizers` files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

import numpy as np

from farspan.errors import DataError

BYTES = "bytes"
USUAL_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|end▁of▁sentence|>")


class Tokenizer(ABC):
    """Turns text into token ids.

    name: the argument of `load_tokenizer`. vocabulary_size: one more than the largest id. end_id: closes a document;
    `encode` never returns it.
    """

    def __init__(self, *, name: str, vocabulary_size: int, end_id: int) -> None:
        self.name, self.vocabulary_size, self.end_id = name, vocabulary_size, end_id

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, uint32 [tokens], without any end or start token."""


@final
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255 and id 256 for the end of a document."""

    def __init__(self) -> None:
        super().__init__(name=BYTES, vocabulary_size=257, end_id=256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


@final
class FileTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` JSON file."""

    def __init__(self, path: str, *, end_token: str | None = None) -> None:
        """Read `path`; raises DataError when it cannot be read or has no end-of-document token."""
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
            self._tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(
                f"{path} is not a tokenizers JSON file ({error}); pass a complete tokenizer.json."
            ) from error
        # A file may set truncation and padding for its model, which would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells out a special token must not end there.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have holes, so the number of entries is not enough.
        vocabulary_size = max(vocabulary.values(), default=-1) + 1
        super().__init__(name=path, vocabulary_size=vocabulary_size, end_id=_end_id(path, vocabulary, end_token))

    def encode(self, text: str) -> np.ndarray:
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the Rust side raises bare Exception, such as for a missing unknown token
            raise DataError(f"The tokenizer {self.name} cannot encode a document ({error}); use another.") from error
        return np.array(encoding.ids, dtype=np.uint32)


def load_tokenizer(name: str, *, end_token: str | None = None) -> Tokenizer:
    """Return the tokenizer `name`: "bytes" or the path of a tokenizers JSON file; raises DataError."""
    if name != BYTES:
        return FileTokenizer(name, end_token=end_token)
    if end_token is not None:
        raise DataError(f"The tokenizer {BYTES!r} has its own end-of-document id; drop --end-token {end_token!r}.")
    return ByteTokenizer()


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
