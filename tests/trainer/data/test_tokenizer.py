"""Tokenizers against plain Python, and every refusal by its message."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from farspan.errors import DataError
from farspan.trainer.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")

CORPUS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"]


@pytest.fixture
def bpe_file(tmp_path):
    """Return a function that trains a byte-level BPE with the given special tokens and returns its file."""

    def train(*special: str, truncate: bool = False) -> str:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            show_progress=False,
            special_tokens=list(special),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        if truncate:
            tokenizer.enable_truncation(max_length=3)
            tokenizer.enable_padding(length=50)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        return str(path)

    return train


@pytest.mark.parametrize("text", ["", "abc", "é\x00\r\n\n漢字🙂"])
def test_bytes_are_utf8(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert ids.dtype == np.uint32
    assert (tokenizer.name, tokenizer.vocabulary_size, tokenizer.end_id) == ("bytes", 257, 256)


def test_bytes_refuse_an_end_token():
    with pytest.raises(DataError, match=r"drop --end-token '</s>'"):
        load_tokenizer("bytes", end_token="</s>")


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_file_finds_the_usual_end_token(bpe_file, end):
    path = bpe_file("<pad>", end)
    tokenizer = load_tokenizer(path)
    vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))["model"]["vocab"]
    assert tokenizer.end_id == vocabulary[end] == 1
    assert tokenizer.vocabulary_size == len(vocabulary)
    assert tokenizer.name == path


def test_file_encodes_text_that_decodes_back(bpe_file):
    path = bpe_file("</s>")
    ids = load_tokenizer(path).encode(CORPUS[0] + " é🙂")
    assert ids.dtype == np.uint32
    assert len(ids) < len(CORPUS[0])  # merges were used
    assert tokenizers.Tokenizer.from_file(path).decode(ids.tolist()) == CORPUS[0] + " é🙂"


def test_file_with_truncation_and_padding_cuts_nothing(bpe_file):
    path = bpe_file("</s>", truncate=True)
    text = " ".join(CORPUS * 20)
    assert tokenizers.Tokenizer.from_file(path).decode(load_tokenizer(path).encode(text).tolist()) == text
    assert len(load_tokenizer(path).encode("a")) == 1


def test_spelled_out_end_token_does_not_end_a_document(bpe_file):
    tokenizer = load_tokenizer(bpe_file("</s>"))
    ids = tokenizer.encode("the </s> cat")
    assert len(ids) > 0
    assert tokenizer.end_id not in ids


def test_no_start_or_end_token_is_added(bpe_file):
    path = bpe_file("</s>")
    raw = tokenizers.Tokenizer.from_file(path)
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    raw.save(path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.end_id not in tokenizer.encode("the cat")


def test_vocabulary_with_holes_counts_the_largest_id(tmp_path):
    path = tmp_path / "holes.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "cat": 9}, unk_token="<unk>")).save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocabulary_size == 10
    with pytest.raises(DataError, match=r"holes\.json cannot encode"):
        tokenizer.encode("zebra")


def test_end_token_by_name(bpe_file):
    path = bpe_file("</s>", "[STOP]")
    assert load_tokenizer(path).end_id == 0
    assert load_tokenizer(path, end_token="[STOP]").end_id == 1
    with pytest.raises(DataError, match=r"tokenizer\.json has no token '\[HALT\]'; pass another --end-token"):
        load_tokenizer(path, end_token="[HALT]")


def test_file_without_end_token_is_refused(bpe_file):
    with pytest.raises(DataError, match=r"tokenizer\.json has none of the usual .* with --end-token"):
        load_tokenizer(bpe_file("[STOP]"))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        load_tokenizer(str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match=r"is a folder; pass the tokenizer\.json inside it"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "cut.json").write_text('{"version": "1.0", "mod')
    with pytest.raises(DataError, match=r"cut\.json is not a tokenizers JSON file"):
        load_tokenizer(str(tmp_path / "cut.json"))


def test_missing_package_is_named_for_a_file_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = tmp_path / "my.json"
    with pytest.raises(DataError, match=r"my\.json does not exist \(or pass --tokenizer bytes\)\.$"):
        load_tokenizer(str(path))
    path.write_text("{}")
    with pytest.raises(DataError, match=r"my\.json needs the package tokenizers; `pip install -e '\.\[data\]'`"):
        load_tokenizer(str(path))
