"""Text to token ids: the built-in byte tokenizer and Hugging Face `tokenizers` files."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from farspan.errors import DataError

BYTES = "bytes"
# The fifth is DeepSeek's, with full-width bars.
USUAL_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|end\u2581of\u2581sentence|>",
    "[EOS]",
)
TOKENIZER_FOLDER = "tokenizer"
"""Where a prepared folder keeps the tokenizer's files."""
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Name the special tokens; the first that does so counts."""
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    *CONFIG_FILES,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
BOS_CHOICES = ("auto", "always", "never")

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """Turns text into token ids; can be sent to another process."""

    name: str
    """The argument of `load_tokenizer`."""
    vocabulary_size: int
    """One more than the largest id."""
    end_id: int
    """Closes a document; `encode` never returns it."""
    encode: Callable[[str], np.ndarray]
    """Returns the ids of a text, uint32 [tokens], without any end or start token."""
    words: Callable[[str], Sequence[int | None]] | None = None
    """Returns the word that each token of a text is from, counted from 0, where the model chooses the tokens of a word
    together; None where it joins neighbors."""
    start_ids: tuple[int, ...] = ()
    """Open a document; empty or the beginning-of-sequence token."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The tokenizer's files by name; empty for bytes."""

    @property
    def sha256(self) -> str | None:
        """The hash of tokenizer.json, None for bytes."""
        return hashlib.sha256(self.files[TOKENIZER_FILE]).hexdigest() if self.files else None


def load_tokenizer(name: str, *, end_token: str | None = None, bos: str = "auto") -> Tokenizer:
    """Return the tokenizer `name`: "bytes" or the path of a tokenizers JSON file; raises DataError.

    Logs the end token and the start tokens of a file. bos: whether documents begin with the beginning-of-sequence
    token; "auto" follows the tokenizer, see `_start_ids`.
    """
    if name != BYTES:
        return _load_file(Path(name), end_token, bos)
    if end_token is not None:
        raise DataError(f"The tokenizer {BYTES!r} has its own end-of-document id; drop --end-token {end_token!r}.")
    if bos == "always":
        raise DataError(f"The tokenizer {BYTES!r} has no beginning-of-sequence token; drop --bos always.")
    return Tokenizer(name=BYTES, vocabulary_size=257, end_id=256, encode=_encode_bytes)


def _encode_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes as ids 0..255; id 256 is left for the end of a document."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


class FileEncoder:
    """The `encode` of a tokenizers JSON file."""

    def __init__(self, name: str, content: bytes) -> None:
        """Raises DataError where the package is absent or the file is not of its format."""
        self._name, self._content = name, content
        try:
            import tokenizers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise DataError(
                f"Reading the tokenizer file {name} needs the package tokenizers; "
                f"`pip install -e '.[data]'`, or pass --tokenizer {BYTES}."
            ) from error
        with _failures_reported(f"{name} is not a tokenizers JSON file", "pass a complete tokenizer.json"):
            self.tokenizer = tokenizers.Tokenizer.from_buffer(content)
        # A file may set truncation and padding for its model, which would silently cut documents.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # A document that spells out a special token must not end there.
        self.tokenizer.encode_special_tokens = True
        self.dropout = getattr(self.tokenizer.model, "dropout", None)
        if self.dropout:
            self.tokenizer.model.dropout = None

    def __reduce__(self) -> tuple[type, tuple[str, bytes]]:
        return FileEncoder, (self._name, self._content)

    def __call__(self, text: str) -> np.ndarray:
        with self._encoding():
            # A batch, though of one text: only these leave out offsets, which take a third of the time.
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32)

    def words(self, text: str) -> Sequence[int | None]:
        """See `Tokenizer.words`."""
        with self._encoding():
            return self.tokenizer.encode(text, add_special_tokens=False).word_ids

    def template_start(self, vocabulary: Mapping[str, int]) -> tuple[int, ...]:
        """Return the ids that the file's template puts before a text."""
        # Any text that the model knows.
        for text in ("a", *vocabulary):
            with suppress(DataError), self._encoding():
                encoding = self.tokenizer.encode(text)
                # None for tokens of the template.
                if 0 in encoding.sequence_ids:
                    return tuple(encoding.ids[: encoding.sequence_ids.index(0)])
        return ()

    def _encoding(self) -> AbstractContextManager[None]:
        return _failures_reported(f"The tokenizer {self._name} cannot encode a document", "use another")


@contextmanager
def _failures_reported(problem: str, fix: str) -> Iterator[None]:
    """Raise DataError where the Rust side fails: by a bare Exception, or by a panic, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DataError(f"{problem} ({error}); {fix}.") from error
        raise


def _load_file(path: Path, end_token: str | None, bos: str) -> Tokenizer:
    if not path.is_file():
        problem = "is a folder; pass the tokenizer.json inside it" if path.is_dir() else "does not exist"
        raise DataError(f"The tokenizer file {path} {problem} (or pass --tokenizer {BYTES}).")
    beside = {name: path.with_name(name) for name in TOKENIZER_FILES if name != TOKENIZER_FILE}
    try:
        content = path.read_bytes()
        files = {name: file.read_bytes() for name, file in beside.items() if file.is_file()}
    except OSError as error:
        raise DataError(f"The tokenizer file {error.filename} cannot be read: {error.strerror}.") from error
    encode = FileEncoder(str(path), content)
    if encode.dropout:
        log.info("%-12sof %g, set to 0: a text always has the same tokens", "dropout", encode.dropout)
    vocabulary = encode.tokenizer.get_vocab(with_added_tokens=True)
    settings = {name: _settings(path.with_name(name), files[name]) for name in CONFIG_FILES if name in files}
    return Tokenizer(
        name=str(path),
        # Ids may have holes, so the number of entries is not enough.
        vocabulary_size=max(vocabulary.values(), default=-1) + 1,
        end_id=_end_id(path, vocabulary, settings, end_token),
        encode=encode,
        words=None if type(encode.tokenizer.model).__name__ == "BPE" else encode.words,
        start_ids=_start_ids(path, vocabulary, settings, bos, encode.template_start(vocabulary)),
        files={TOKENIZER_FILE: content, **files},
    )


def _settings(path: Path, content: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); restore it or move it away from the tokenizer.") from error
    return settings if isinstance(settings, dict) else {}


def _named(settings: Mapping[str, dict[str, Any]], kind: str) -> tuple[str, str] | None:
    """Return the special token of a kind, such as "eos_token", and the file that names it."""
    for name, values in settings.items():
        token = values.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token, name
    return None


def _end_id(
    path: Path, vocabulary: Mapping[str, int], settings: Mapping[str, dict[str, Any]], end_token: str | None
) -> int:
    """Return the id of `end_token`; without one, of the eos_token of the files beside it, or of a usual name."""
    usual, named = [token for token in USUAL_END_TOKENS if token in vocabulary], _named(settings, "eos_token")
    if end_token is not None:
        if end_token not in vocabulary:
            raise DataError(f"The tokenizer {path} has no token {end_token!r}; pass another --end-token.")
        token, source = end_token, "of --end-token"
    elif named is not None:
        token, source = named[0], f"the eos_token of {named[1]}"
        if token not in vocabulary:
            raise DataError(f"The tokenizer {path} lacks {token!r}, {source}; pass --end-token.")
    elif usual:
        token, source = usual[0], "by its name"
        if usual[1:]:
            source += f", not {', '.join(map(repr, usual[1:]))}; --end-token takes another"
    else:
        raise DataError(
            f"The tokenizer {path} has none of the usual end-of-document tokens ({', '.join(USUAL_END_TOKENS)}); "
            "name its own with --end-token."
        )
    log.info("%-12s%r (id %d), %s", "end token", token, vocabulary[token], source)
    return vocabulary[token]


def _start_ids(
    path: Path,
    vocabulary: Mapping[str, int],
    settings: Mapping[str, dict[str, Any]],
    bos: str,
    template: tuple[int, ...],
) -> tuple[int, ...]:
    """Return the ids that open a document.

    "auto": add_bos_token of tokenizer_config.json decides, without it the template of the file. They are what the
    template puts first, else the bos_token of the files beside it.
    """
    wanted = settings.get(CONFIG_FILES[0], {}).get("add_bos_token")
    source = f"add_bos_token of {CONFIG_FILES[0]}"
    if bos != "auto":
        wanted, source = bos == "always", f"--bos {bos}"
    elif not isinstance(wanted, bool):
        wanted, source = bool(template), f"the template of {path.name}"
    named, ids = _named(settings, "bos_token"), template if wanted else ()
    if wanted and not template:
        if named is None or named[0] not in vocabulary:
            raise DataError(
                f"The tokenizer {path} names no beginning-of-sequence token, which {source} asks for; pass --bos never."
            )
        ids = (vocabulary[named[0]],)
    names = {number: token for token, number in vocabulary.items()}
    shown = ", ".join(f"{names[number]!r} (id {number})" for number in ids)
    log.info("%-12s%s, by %s", "start token", shown or "none", source)
    return ids
