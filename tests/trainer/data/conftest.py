from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from farspan.trainer.data.source import SplitWriter, TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[Sequence[int]], TokenSource]:
    """Return a function that writes documents of these lengths; no two documents share a token but the end token."""

    def make(lengths: Sequence[int]) -> TokenSource:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        first = 0
        with SplitWriter(folder, tokenizer=load_tokenizer("bytes")) as writer:
            for length in lengths:
                writer.add(np.arange(first, first + length), num_bytes=max(length, 1))
                first += length
            writer.finish()
        return TokenSource(folder)

    return make
