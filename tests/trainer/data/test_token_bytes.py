"""Bytes of tokens against what the tokenizer itself decodes, for every kind of tokenizer file."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.errors import DataError
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.token_bytes import TOKEN_BYTES_FILE, count_bytes, read_token_bytes, token_bytes
from farspan.trainer.data.tokenizer import load_tokenizer
from tests.support.bpe import byte_level_bpe

tokenizers = pytest.importorskip("tokenizers")
decoders, models, normalizers, pre = (
    tokenizers.decoders, tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers
)  # fmt: skip

TEXTS = ["the cat sat on the mat, and  the dog", "the été 漢字🙂 naïve", "a", " the\n\tcat <tool>x"]
SPECIAL = ["</s>", "<unk>", "<s>"]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def byte_level() -> Any:
    tokenizer = byte_level_bpe(TEXTS[:1], vocabulary_size=290, special=SPECIAL)
    # The second contains a character that the decoder would take for a byte, the third one that it knows as no byte.
    tokenizer.add_tokens(["<tool>", "é+", "  "])
    return tokenizer


def byte_fallback() -> Any:
    """As Llama 2: SentencePiece's BPE, with a space before each text, which the decoder strips."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in ("▁", "t", "h", "e", "c", "a", "é", "▁t", "he", "▁the", "▁c", "▁▁"):
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "c"), ("▁", "▁")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(LLAMA)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def metaspace() -> Any:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.Metaspace(), decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, show_progress=False, special_tokens=SPECIAL, unk_token="<unk>"
    )
    tokenizer.train_from_iterator([*TEXTS, *TEXTS], trainer)
    return tokenizer


def word_piece(*, cleanup: bool = False) -> Any:
    words = ["[UNK]", "</s>", "<s>", "the", "cat", "##s", "##at", "on", "mat", ",", "m", "s", "a"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.BertPreTokenizer(), decoders.WordPiece(cleanup=cleanup)
    tokenizer.add_special_tokens(["[UNK]", "</s>", "<s>"])
    return tokenizer


def word_suffix() -> Any:
    """As GPT-1: words end in </w>, which decodes to a space but at the end of the text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre.Whitespace(), decoders.BPEDecoder("</w>")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, show_progress=False, special_tokens=SPECIAL, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def no_decoder() -> Any:
    words = {"</s>": 0, "the": 1, "cat": 2, "été": 3, "<unk>": 4, "<s>": 5}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = [byte_level, byte_fallback, metaspace, word_piece, no_decoder]


def save(tokenizer: Any, folder: Path) -> str:
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def decoded_bytes(tokenizer: Any, ids: list[int]) -> int:
    return len(tokenizer.decode(ids).encode())


@pytest.mark.parametrize("make", KINDS)
def test_tokens_add_up_to_the_decoded_text(tmp_path: Path, make: Callable[[], Any]) -> None:
    path = save(make(), tmp_path)
    file, tokenizer = tokenizers.Tokenizer.from_file(path), load_tokenizer(path)
    table = token_bytes(tokenizer)
    assert (table.dtype, table.shape) == (np.int32, (tokenizer.vocabulary_size,))
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        # From the second token on, as in an evaluation; the first may lose a space.
        assert bytes_of_labels(table, ids) == decoded_bytes(file, ids) - decoded_bytes(file, ids[:1]), text
        # With a token that opens the document the first of the text is a label; the end token ends it.
        # (A text of unknown tokens only has no space to lose.)
        opened = [file.token_to_id("<s>"), *ids, tokenizer.end_id]
        assert max(bytes_of_labels(table, opened), 0) == decoded_bytes(file, ids), text
        if make is byte_level:
            assert decoded_bytes(file, ids) == len(text.encode()), text


def bytes_of_labels(table: np.ndarray, ids: list[int]) -> int:
    labels, before = (np.bincount(part, minlength=len(table)) for part in (ids[1:], ids[:-1]))
    return count_bytes(table, labels, before)


def test_values_by_hand(tmp_path: Path) -> None:
    def table_of(tokenizer: Any, *tokens: str) -> list[int]:
        table = token_bytes(load_tokenizer(save(tokenizer, tmp_path)))
        return [int(table[tokenizer.token_to_id(token)]) for token in tokens]

    # Ġ is a space, Ã the first of the two bytes of é.
    assert table_of(byte_level(), "Ġthe", "Ã", "<tool>", "é+", "  ", *SPECIAL) == [4, 1, 6, 3, 2, 0, 0, 0]
    assert table_of(byte_fallback(), "▁the", "<0xE6>", "<0x0A>", "é", "▁▁", *SPECIAL) == [4, 1, 1, 2, 2, -1, 0, -1]
    assert table_of(metaspace(), "▁", *SPECIAL) == [1, -1, 0, -1]
    assert table_of(word_piece(), "cat", "##s", ",", "[UNK]", "<s>") == [4, 1, 2, 0, -1]
    assert table_of(no_decoder(), "the", "été", *SPECIAL) == [4, 6, -1, 0, -1]
    suffixed = word_suffix()
    ends = [token for token in suffixed.get_vocab() if token.endswith("</w>")]
    assert table_of(suffixed, *ends) == [len(token.removesuffix("</w>").encode()) + 1 for token in ends]


@pytest.mark.parametrize("cleanup", [False, True])
def test_a_decoder_that_looks_at_neighbors_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cleanup: bool
) -> None:
    caplog.set_level(logging.INFO, logger="farspan")
    token_bytes(load_tokenizer(save(word_piece(cleanup=cleanup), tmp_path)))
    assert ("approximate" in caplog.text) == cleanup


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    for overwrite in (False, True):
        prepare(
            [tmp_path / "text.txt"], tokenizer=tokenizer, out=tmp_path / "tokens", validation_from_ends=True,
            validation_fraction=0.5, overwrite=overwrite,
        )  # fmt: skip
    return tmp_path / "tokens"


def test_prepared_data_have_them(prepared: Path, tmp_path: Path) -> None:
    expected = token_bytes(load_tokenizer(str(tmp_path / "tokenizer.json")))
    for split in ("train", "validation"):
        found = read_token_bytes(TokenSource(prepared / split))
        assert found is not None
        assert found.tolist() == expected.tolist()
    # The split's bytes are those of all its tokens.
    source = TokenSource(prepared / "train")
    assert expected[source.tokens].sum() == source.num_bytes == bytes_of_labels(expected, [0, *source.tokens])


def test_data_of_earlier_versions_have_none_but_those_of_bytes(prepared: Path) -> None:
    (prepared / TOKEN_BYTES_FILE).unlink()
    assert read_token_bytes(TokenSource(prepared / "train")) is None
    meta = json.loads((prepared / "train" / "meta.json").read_text())
    (prepared / "train" / "meta.json").write_text(json.dumps(meta | {"tokenizer": "bytes"}))
    found = read_token_bytes(TokenSource(prepared / "train"))
    assert found is not None
    assert (found.sum(), found[meta["end_id"]]) == (meta["vocabulary_size"] - 1, 0)


@pytest.mark.parametrize("content", [b"", np.zeros(3, dtype=np.int32), np.zeros(292, dtype=np.int64)])
def test_a_damaged_table_is_refused(prepared: Path, content: bytes | np.ndarray) -> None:
    path = prepared / TOKEN_BYTES_FILE
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(DataError, match=r"token_bytes\.npy .*; prepare the folder again"):
        read_token_bytes(TokenSource(prepared / "train"))
