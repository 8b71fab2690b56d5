"""Data that was changed in place is refused, data that was only copied is not."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from farspan.errors import DataError
from farspan.trainer.data import source
from farspan.trainer.data.source import META_FILE, OFFSETS_FILE, TOKENS_FILE, check_integrity
from tests.support.checkpoint_ranks import flip


@pytest.fixture
def split(tiny_data: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_data / "train", tmp_path / "train"))
    os.utime(folder / META_FILE)
    return folder


def later(path: Path) -> None:
    os.utime(path, (time.time() + 10, time.time() + 10))


def test_fresh_data_is_not_hashed(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.trainer.data.source._fingerprint", lambda source: pytest.fail("hashed"))
    check_integrity(split)


@pytest.mark.parametrize("chunk_tokens", [source.CHUNK_TOKENS, 7, 1], ids=["whole", "chunks", "tokens"])
@pytest.mark.parametrize("name", [TOKENS_FILE, OFFSETS_FILE])
def test_a_copy_is_hashed_once(
    split: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, name: str, chunk_tokens: int
) -> None:
    """The hash of a split of many chunks is that of its writer, which has none."""
    monkeypatch.setattr(source, "CHUNK_TOKENS", chunk_tokens)
    os.utime(split / META_FILE, (1, 1))
    os.utime(split / name)
    check_integrity(split)
    assert [record.getMessage().split(",")[0] for record in log.records] == [f"hashing     {split}"]
    monkeypatch.setattr("farspan.trainer.data.source._fingerprint", lambda source: pytest.fail("hashed"))
    check_integrity(split)


def test_one_other_token_is_refused(split: Path) -> None:
    flip(split / TOKENS_FILE, 0)
    later(split / TOKENS_FILE)
    with pytest.raises(DataError, match=r"train was changed .*fingerprint \w{12}\.\.\., now \w{12}"):
        check_integrity(split)


def test_other_documents_are_refused(split: Path) -> None:
    offsets = np.load(split / OFFSETS_FILE)
    offsets[1] += 1
    np.save(split / OFFSETS_FILE, offsets)
    later(split / OFFSETS_FILE)
    with pytest.raises(DataError, match="was changed"):
        check_integrity(split)
