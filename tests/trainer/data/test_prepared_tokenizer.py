"""What a tokenizer file brings into a prepared folder: start tokens, documents without tokens, its own files."""

import argparse
import hashlib
import json

import pytest

from farspan.errors import DataError
from farspan.trainer.data.prepare import add_arguments, prepare, run
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")


def prepared(path, out, **options):
    return prepare([path], out=out, validation_from_ends=True, **options)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.fixture
def stripping(tmp_path):
    """Return the file of a tokenizer that strips spaces and begins documents with <s>."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="a"))
    raw.normalizer = tokenizers.normalizers.Strip()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["</s>", "<s>"])
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (tmp_path / "tokenizer").mkdir()
    raw.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer" / "tokenizer.json"


def ids_of(folder):
    source = TokenSource(folder)
    return [source.document(index).tolist() for index in range(source.num_documents)]


def test_documents_without_tokens_are_left_out_and_counted(tmp_path, stripping, capsys):
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", " \n ", "b a a", "\t")))
    run(parse(lines, "--tokenizer", stripping, "--out", tmp_path / "out", "--validation-fraction", "0.5"))
    splits = [ids_of(tmp_path / "out" / split) for split in ("train", "validation")]
    assert sorted(splits[0] + splits[1]) == [[1, 2, 3, 0], [1, 3, 2, 2, 0]]
    assert "left out    2 documents without any token" in capsys.readouterr().out
    lines.write_text(json.dumps({"text": " "}))
    with pytest.raises(DataError, match=r"No input holds a readable document \(0 skipped, 1 without tokens\)"):
        prepare([lines], tokenizer=load_tokenizer(str(stripping)), out=tmp_path / "none")


@pytest.mark.parametrize(("bos", "start"), [([], [1]), (["--bos", "always"], [1]), (["--bos", "never"], [])])
def test_both_parts_of_a_book_begin_with_the_start_token(tmp_path, stripping, bos, start):
    (tmp_path / "book.txt").write_text("a b a a\nb b")
    ends = ["--validation-from-ends", "--validation-fraction", "0.3"]
    run(parse(tmp_path / "book.txt", "--tokenizer", stripping, "--out", tmp_path / "out", *ends, *bos))
    assert ids_of(tmp_path / "out" / "train") == [[*start, 2, 3, 2, 2, 0]]
    assert ids_of(tmp_path / "out" / "validation") == [[*start, 3, 3, 0]]


def test_the_tokenizer_is_kept_beside_the_tokens(tmp_path, stripping):
    (tmp_path / "book.txt").write_text("a b")
    (stripping.parent / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (stripping.parent / "unrelated.bin").write_bytes(b"weights")
    named = stripping.rename(stripping.with_name("mine.json"))
    for overwrite in (False, True):
        prepared(tmp_path / "book.txt", tmp_path / "out", tokenizer=load_tokenizer(str(named)), overwrite=overwrite)
        kept = {path.name: path.read_bytes() for path in (tmp_path / "out" / "tokenizer").iterdir()}
        config = (stripping.parent / "tokenizer_config.json").read_bytes()
        assert kept == {"tokenizer.json": named.read_bytes(), "tokenizer_config.json": config}
    digest = hashlib.sha256(named.read_bytes()).hexdigest()
    assert {TokenSource(tmp_path / "out" / split).meta.tokenizer_sha256 for split in ("train", "validation")} == {
        digest
    }
    (tmp_path / "out" / "tokenizer" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"notes\.txt is not a result"):
        prepared(tmp_path / "book.txt", tmp_path / "out", tokenizer=load_tokenizer("bytes"), overwrite=True)
