"""A small byte-level BPE tokenizer, as GPT-2's."""

from collections.abc import Sequence
from typing import Any

import pytest


def byte_level_bpe(texts: Sequence[str], *, vocabulary_size: int, special: Sequence[str] = ()) -> Any:
    """Return a tokenizer of the `tokenizers` package, trained on texts; skips the test where the package is absent."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        show_progress=False,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
