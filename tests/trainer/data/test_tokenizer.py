"""Tokenizers against plain Python, and every refusal by its message."""

import hashlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from farspan.errors import DataError
from farspan.trainer.data.tokenizer import load_tokenizer
from tests.support.bpe import byte_level_bpe

tokenizers = pytest.importorskip("tokenizers")

CORPUS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"]


@pytest.fixture
def bpe_file(tmp_path):
    """Return a function that trains a byte-level BPE with the given special tokens and returns its file."""

    def train(*special: str, truncate: bool = False) -> str:
        tokenizer = byte_level_bpe(CORPUS, vocabulary_size=300, special=special)
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


def test_a_panic_of_the_library_is_refused(tmp_path):
    file = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "x": 1}, unk_token="x"))
    # Nothing is left of the token.
    strip, replace = tokenizers.normalizers.Strip(), tokenizers.normalizers.Replace(" ", "\u2581")
    file.normalizer = tokenizers.normalizers.Sequence([strip, replace])
    file.add_tokens([tokenizers.AddedToken("    ", normalized=True)])
    file.save(str(tmp_path / "panics.json"))
    tokenizer = load_tokenizer(str(tmp_path / "panics.json"))
    assert tokenizer.words is not None
    for call in (tokenizer.encode, tokenizer.words):
        with pytest.raises(DataError, match=r"panics\.json cannot encode a document \(AddedVocabulary bad split\)"):
            call("a  b")


def test_merges_are_not_dropped_by_chance(bpe_file, caplog):
    path = bpe_file("</s>")
    wanted = load_tokenizer(path).encode("the cat sat")
    raw = tokenizers.Tokenizer.from_file(path)
    raw.model.dropout = 0.9
    raw.save(path)
    with caplog.at_level("INFO", "farspan"):
        tokenizer = load_tokenizer(path)
    assert "of 0.9, set to 0" in caplog.text
    assert all(np.array_equal(tokenizer.encode("the cat sat"), wanted) for _ in range(20))


def test_end_token_by_name(bpe_file):
    path = bpe_file("</s>", "[STOP]")
    assert load_tokenizer(path).end_id == 0
    assert load_tokenizer(path, end_token="[STOP]").end_id == 1
    with pytest.raises(DataError, match=r"tokenizer\.json has no token '\[HALT\]'; pass another --end-token"):
        load_tokenizer(path, end_token="[HALT]")


def beside(path: str, name: str, **settings) -> None:
    Path(path).with_name(name).write_text(json.dumps(settings), encoding="utf-8")


DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize("end", [DEEPSEEK_END, "<|end\u2581of\u2581sentence|>"])
def test_deepseek_names_are_usual(bpe_file, end):
    assert load_tokenizer(bpe_file("<pad>", end)).end_id == 1


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("as_object", [False, True])
def test_the_end_token_is_the_one_that_the_files_beside_it_name(bpe_file, caplog, name, as_object):
    caplog.set_level("INFO", logger="farspan")
    path = bpe_file("<|endoftext|>", "</s>", "<|im_end|>")
    beside(path, name, eos_token={"content": "<|im_end|>", "lstrip": False} if as_object else "<|im_end|>")
    assert load_tokenizer(path).end_id == 2
    assert f"end token   '<|im_end|>' (id 2), the eos_token of {name}" in caplog.text
    # What is asked for counts more.
    assert load_tokenizer(path, end_token="</s>").end_id == 1
    beside(path, name, eos_token=None)
    assert load_tokenizer(path).end_id == 0
    assert "end token   '<|endoftext|>' (id 0), by its name, not '</s>'; --end-token takes another" in caplog.text


def test_files_beside_a_tokenizer_that_do_not_fit_are_refused(bpe_file):
    path = bpe_file("</s>")
    beside(path, "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(DataError, match=r"lacks '<\|im_end\|>', the eos_token of tokenizer_config"):
        load_tokenizer(path)
    Path(path).with_name("tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(path)


def template(path: str, single: str) -> None:
    raw = tokenizers.Tokenizer.from_file(path)
    names = [word for word in single.split() if word != "$A"]
    special = [(name, raw.token_to_id(name)) for name in names]
    raw.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    raw.save(path)


@pytest.mark.parametrize(
    ("single", "settings", "expected"),
    [
        ("<s> $A", {}, {"auto": (1,), "always": (1,), "never": ()}),
        ("<s> <x> $A </s>", {}, {"auto": (1, 2), "always": (1, 2), "never": ()}),
        ("$A </s>", {"bos_token": "<s>"}, {"auto": (), "always": (1,), "never": ()}),
        ("$A", {"bos_token": {"content": "<s>"}, "add_bos_token": True}, {"auto": (1,), "always": (1,), "never": ()}),
        ("<s> $A", {"bos_token": "<s>", "add_bos_token": False}, {"auto": (), "always": (1,), "never": ()}),
    ],
)
def test_documents_begin_as_the_tokenizer_says(bpe_file, caplog, single, settings, expected):
    caplog.set_level("INFO", logger="farspan")
    path = bpe_file("</s>", "<s>", "<x>")
    template(path, single)
    beside(path, "tokenizer_config.json", **settings)
    assert {bos: load_tokenizer(path, bos=bos).start_ids for bos in expected} == expected
    assert "start token none, by --bos never" in caplog.text
    assert "start token '<s>' (id 1)" in caplog.text


def test_a_start_token_that_nothing_names_is_refused(bpe_file):
    with pytest.raises(DataError, match=r"no beginning-of-sequence token, .*; pass --bos never"):
        load_tokenizer(bpe_file("</s>"), bos="always")
    with pytest.raises(DataError, match=r"drop --bos always"):
        load_tokenizer("bytes", bos="always")


def test_a_tokenizer_encodes_alike_in_another_process(bpe_file):
    tokenizer = load_tokenizer(bpe_file("</s>", truncate=True))
    text = "the </s> cat" * 9
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.sha256 == tokenizer.sha256 == hashlib.sha256(Path(tokenizer.name).read_bytes()).hexdigest()


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
