"""Pieces of a text have the tokens of the whole, under tokenizers of every kind, or there is one piece."""

import random
from functools import cache

import numpy as np
import pytest

from farspan.trainer.data import pieces as module
from farspan.trainer.data.pieces import pieces
from farspan.trainer.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
models, normalizers, pre, trainers = (
    tokenizers.models,
    tokenizers.normalizers,
    tokenizers.pre_tokenizers,
    tokenizers.trainers,
)
Regex = tokenizers.Regex

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = [
    *["the", "cat", "sat", "on", "a", "mat,", "naïve", "café", "Ünder", "漢字かな交じり文。"],
    *["1234567", "x_y=f(a[i])", "...", "--", "don't", "🙂🙂", "HELLO"],
]
GAPS = [" "] * 12 + ["  ", "\n", "\n\n", "\r\n", "\t", "    ", "\u3000"]


UNITS = ["ab-", "ไทยคำ", "a\u0301", "x.", "=", "0", "\U0001f642\u200d", "ßs", "漢字。"]


def some_runs(size: int, seed: int) -> str:
    """Words longer than the context of a cut, which repeat themselves."""
    draw = random.Random(seed)
    runs = []
    while sum(map(len, runs)) < size:
        runs.append(draw.choice(UNITS) * draw.choice([1, 2, 3, 7, 40, 300, 700]))
        runs.append(draw.choice(["", "", " ", "\n", " " * 1500]))
    return "".join(runs)[:size]


def some_text(size: int, gaps: list[str] = GAPS) -> str:
    draw = random.Random(size)
    return "".join(draw.choice(WORDS) + draw.choice(gaps) for _ in range(size // 5))[:size]


def byte_level(pre_tokenizer, **options):
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet()
    )


def gpt2():
    return byte_level(pre.ByteLevel(add_prefix_space=False))


def prefix_space():
    return byte_level(pre.ByteLevel(add_prefix_space=True))


def llama3():
    split = pre.Split(Regex(CL100K), behavior="isolated")
    return byte_level(pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]))


def nfc():
    tokenizer, trainer = gpt2()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, trainer


def across_spaces():
    """Pairs of words are tokens."""
    split = pre.Split(Regex(r"\S+ \S+|\s+|\S+"), behavior="isolated")
    return byte_level(pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]))


def fixed_length(length=7):
    split = pre.Split(Regex(rf"(?:.|\n){{1,{length}}}"), behavior="isolated")
    return byte_level(pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]))


def superwords():
    """Tokens of several words, and nothing that splits a text."""
    return tokenizers.Tokenizer(models.BPE()), trainers.BpeTrainer(vocab_size=500, show_progress=False)


def llama2():
    """SentencePiece without pre-tokenizer: the normalizer puts a space before the text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Trained word by word, as SentencePiece does: else tokens would lie across spaces.
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="never")
    return tokenizer, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>"])


def metaspace(scheme):
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>"
    )


def strip():
    tokenizer, trainer = gpt2()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer, trainer


def unsplit_unigram():
    """Spaces are letters like others."""
    tokenizer, trainer = metaspace("first")
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer, trainer


def whole_words():
    tokenizer, trainer = word_piece()
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre.WhitespaceSplit()
    return tokenizer, trainer


def word_piece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=["[UNK]"])


KINDS = {
    "gpt2": gpt2,
    "prefix space": prefix_space,
    "llama3": llama3,
    "nfc": nfc,
    "llama2": llama2,
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "word piece": word_piece,
    "strip": strip,
    "unsplit unigram": unsplit_unigram,
    "whole words": whole_words,
    "across spaces": across_spaces,
    "fixed length": fixed_length,
    "eights": lambda: fixed_length(8),
    "superwords": superwords,
}
UNCUT = ("across spaces", "fixed length", "eights", "superwords", "unsplit unigram")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function that trains the tokenizer of a kind and returns its file."""

    @cache
    def train(kind, *added):
        tokenizer, trainer = KINDS[kind]()
        texts = [*some_text(3000).split("\n"), *(unit * 4 for unit in UNITS for _ in range(20))]
        tokenizer.train_from_iterator(texts, trainer)
        if kind == "llama2":
            tokenizer.pre_tokenizer = None
        if kind == "unsplit unigram":
            tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
        tokenizer.add_tokens([*map(tokenizers.AddedToken, added)])
        tokenizer.add_special_tokens(["</s>"])
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        tokenizer.save(str(path))
        return load_tokenizer(str(path))

    return train


def whole_and_pieces(tokenizer, text, size, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", size)
    data, encode = text.encode(), tokenizer.encode
    found = list(pieces(data, 0, len(data), encode, tokenizer.words))
    assert [piece.is_last for piece in found] == [False] * (len(found) - 1) + [True]
    sizes = [len(piece.text) for piece in found]
    return encode(text), sizes, [encode(piece.text.decode())[piece.context_tokens :] for piece in found]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole(load, monkeypatch, kind):
    tokenizer = load(kind)
    for size, length in ((50, 2000), (1000, 9000)):
        whole, sizes, found = whole_and_pieces(tokenizer, some_text(length), size, monkeypatch)
        np.testing.assert_array_equal(np.concatenate(found), whole)
        assert len(found) >= (1 if kind in UNCUT else length / size / 3)
        # The next border, and context before it, are at most some words away; the last piece may be twice as large.
        assert kind in UNCUT or max(sizes) <= 2 * size + 100


@pytest.mark.parametrize(("kind", "text"), [("across spaces", "a bc " * 400), ("eights", "1234567 " * 400)])
def test_contexts_of_all_phases_have_to_agree(load, monkeypatch, kind, text):
    """The first border, inside a pair of words or eight characters, looks right from others that are like it."""
    whole, _, found = whole_and_pieces(load(kind), text, 301, monkeypatch)
    np.testing.assert_array_equal(np.concatenate(found), whole)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "metaspace first"])
@pytest.mark.parametrize(
    ("text", "fewest"),
    [
        ("a" * 3000, 1),
        ("ab " * 999, 5),
        (" " * 2000 + "x" + "\n" * 1500, 1),
        ("".join(random.Random(5).choices("漢字かな。", k=1500)), 5),
        ("x\n\ny\n\n" * 300, 3),
        ("1234567890" * 200, 1),
    ],
    ids=["one letter", "period", "spaces", "no spaces", "blank lines", "digits"],
)
def test_monotonous_texts_too(load, monkeypatch, kind, text, fewest):
    tokenizer = load(kind)
    whole, _, found = whole_and_pieces(tokenizer, text, 300, monkeypatch)
    np.testing.assert_array_equal(np.concatenate(found), whole)
    is_one_word = tokenizer.words is not None and " " not in text
    assert len(found) >= (1 if is_one_word else fewest)


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama2", "nfc", "metaspace always", "strip", "unsplit unigram", "whole words", "word piece"]
)
def test_words_longer_than_the_context_of_a_cut(load, monkeypatch, kind):
    for seed in range(9):
        text = some_runs(12_000, seed)
        whole, _, found = whole_and_pieces(load(kind), text, (60, 900, 3000)[seed % 3], monkeypatch)
        np.testing.assert_array_equal(np.concatenate(found), whole, err_msg=f"seed {seed}")


def test_added_tokens_are_not_cut(load, monkeypatch):
    tokenizer = load("gpt2", "the cat", "    ")
    whole, _, found = whole_and_pieces(tokenizer, "the cat  sat    on the cat " * 100, 100, monkeypatch)
    np.testing.assert_array_equal(np.concatenate(found), whole)
    assert len(found) > 10


def test_a_part_of_a_text(monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 10)
    text = some_text(500).encode()
    found = list(pieces(text, 7, 300, load_tokenizer("bytes").encode))
    assert b"".join(piece.text for piece in found) == text[7:300]
    assert len(found) > 5
    assert list(pieces(text, 9, 9, load_tokenizer("bytes").encode)) == []
