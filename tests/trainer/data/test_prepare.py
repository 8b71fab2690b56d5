"""`prepare`: its files against plain Python, the split, and that it writes a complete result or none."""

import argparse
import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest

from farspan.errors import DataError
from farspan.trainer.data import prepare as module
from farspan.trainer.data.prepare import add_arguments, prepare, run
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
TO_BYTES = ["--tokenizer", "bytes", "--out"]
TEXTS = [f"document {i} says é" + "!" * (i % 5) for i in range(40)]


@pytest.fixture
def corpus(tmp_path):
    """Return a folder with a file per text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return folder


def prepared(inputs, out, fraction=0.3, **options):
    return prepare([inputs], **{"tokenizer": BYTES, "out": out, "validation_fraction": fraction} | options)


def documents(out, split):
    """Read a split back with nothing but json, numpy's file reader and a loop."""
    meta = json.loads((out / split / "meta.json").read_text())
    tokens = np.fromfile(out / split / "tokens.bin", dtype={"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]).tolist()
    texts, current = [], []
    for token in tokens:
        if token == meta["end_id"]:
            texts.append(bytes(current).decode("utf-8"))
            current = []
        else:
            current.append(token)
    assert current == []  # the last document is closed
    return texts


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_every_document_is_in_exactly_one_split_in_order(corpus, tmp_path):
    report = prepared(corpus, tmp_path / "out")
    train, validation = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train]
    assert 4 <= len(validation) <= 22  # 12 expected of 40; these bounds are more than 2.5 sigma away
    assert report.train.num_documents == len(train)
    assert report.validation.num_documents == len(validation)
    assert report.train.num_bytes == sum(len(text.encode()) for text in train)
    assert report.train.num_tokens == report.train.num_bytes + len(train)


def test_files_agree_with_meta(corpus, tmp_path):
    prepared(corpus, tmp_path / "out")
    folder = tmp_path / "out" / "train"
    meta = json.loads((folder / "meta.json").read_text())
    offsets = np.load(folder / "offsets.npy")
    lengths = [len(text.encode()) + 1 for text in documents(tmp_path / "out", "train")]
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    digest = hashlib.sha256((folder / "tokens.bin").read_bytes() + offsets.astype("<i8").tobytes()).hexdigest()
    assert meta == {
        "format_version": 1,
        "tokenizer": "bytes",
        "vocabulary_size": 257,
        "end_id": 256,
        "dtype": "uint16",
        "num_documents": len(lengths),
        "num_tokens": sum(lengths),
        "num_bytes": sum(lengths) - len(lengths),
        "fingerprint": digest,
        "tokenizer_sha256": None,
        "median_tokens": int(np.median(lengths)),
        "longest_tokens": max(lengths),
        "long_documents": {"4096": 0.0, "32768": 0.0, "131072": 0.0},
    }
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "offsets.npy", "tokens.bin"]


def test_the_split_depends_on_content_only(corpus, tmp_path):
    prepared(corpus, tmp_path / "one")
    validation = set(documents(tmp_path / "one", "validation"))
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[::-1], *TEXTS, "a new one"]))
    prepared(lines, tmp_path / "two")
    assert set(documents(tmp_path / "two", "validation")) - {"a new one"} == validation
    assert len(documents(tmp_path / "two", "validation")) >= 2 * len(validation)


def test_two_runs_write_the_same_bytes_and_splits_are_nested(corpus, tmp_path):
    fingerprints = []
    for name, fraction in (("a", 0.3), ("b", 0.3), ("c", 0.6)):
        report = prepared(corpus, tmp_path / name, fraction)
        fingerprints.append((report.train.fingerprint, report.validation.fingerprint))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert set(documents(tmp_path / "a", "validation")) < set(documents(tmp_path / "c", "validation"))


def test_large_vocabulary_is_written_as_uint32(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<eos>": 70_000, "<unk>": 1, "document": 69_999}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.save(str(tmp_path / "big.json"))
    prepared(corpus, tmp_path / "out", tokenizer=load_tokenizer(str(tmp_path / "big.json")))
    source = TokenSource(tmp_path / "out" / "train")
    assert source.tokens.dtype == np.uint32
    assert source.document(0)[[0, 1, -1]].tolist() == [69_999, 1, 70_000]


def test_an_encoding_failure_names_the_document(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0}, unk_token="<unk>")).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"000\.txt: The tokenizer .*t\.json cannot encode"):
        prepare([corpus], tokenizer=load_tokenizer(str(tmp_path / "t.json")), out=tmp_path / "out")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_of_0_to_1_is_refused(corpus, tmp_path, fraction):
    with pytest.raises(DataError, match=rf"--validation-fraction {fraction} "):
        prepared(corpus, tmp_path / "out", fraction)


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused_with_a_fraction_that_works(corpus, tmp_path, fraction, split):
    options = {"tokenizer": BYTES, "out": tmp_path / "out"}
    with pytest.raises(DataError, match=rf"None of the 40 documents falls into the {split} split") as caught:
        prepare([corpus], **options, validation_fraction=fraction)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]
    advised = float(str(caught.value).split("pass --validation-fraction ")[1].split(",")[0])
    prepare([corpus], **options, validation_fraction=advised)


def test_duplicates_alone_cannot_be_split(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("same")
    with pytest.raises(DataError, match=r"give more different documents"):
        prepare([tmp_path / "a", tmp_path / "b"], tokenizer=BYTES, out=tmp_path / "out", validation_fraction=0.5)


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("".join(f"line {i}\n" for i in range(10)), "".join(f"line {i}\n" for i in range(8))),
        ("one line of words only that ends here", "one line of words only that "),
        ("é" * 10, "é" * 8),
        # A line that starts far from there does not count: the end would be three times as long.
        ("a\n" + "b" * 18, "a\n" + "b" * 14),
        ("ab", "a"),
    ],
    ids=["line", "word", "character", "far line", "two characters"],
)
def test_the_end_of_a_book_is_the_validation_split(tmp_path, text, train):
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    run(parse(tmp_path / "book.txt", *TO_BYTES, out, "--validation-from-ends", "--validation-fraction", "0.2"))
    assert (documents(out, "train"), documents(out, "validation")) == ([train], [text[len(train) :]])
    assert sum(TokenSource(out / split).num_bytes for split in ("train", "validation")) == len(text.encode())


def test_the_end_of_every_document_is_the_validation_split(corpus, tmp_path):
    run(parse(corpus, *TO_BYTES, tmp_path / "out", "--validation-from-ends", "--validation-fraction", "0.3"))
    parts = zip(documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation"), strict=True)
    assert [start + end for start, end in parts] == TEXTS


def test_a_single_document_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "book.txt").write_text("once upon a time")
    with pytest.raises(DataError, match=r"None of the 1 documents .*, or pass --validation-from-ends"):
        prepare([tmp_path / "book.txt"], tokenizer=BYTES, out=tmp_path / "out")
    (tmp_path / "book.txt").write_text("x")
    with pytest.raises(DataError, match=r"single character .*; drop --validation-from-ends\."):
        prepare([tmp_path / "book.txt"], tokenizer=BYTES, out=tmp_path / "out", validation_from_ends=True)


def test_nothing_readable_is_refused(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"No input holds a readable document \(1 skipped, 0 without tokens\)"):
        prepare([tmp_path / "corpus"], tokenizer=BYTES, out=tmp_path / "out", skip_unreadable=True)


def test_the_folder_has_the_usual_permissions(corpus, tmp_path):
    (tmp_path / "plain").mkdir()
    prepared(corpus, tmp_path / "out")
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "plain").st_mode


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak_bytes(num_documents: int) -> int:
        lines = tmp_path / f"{num_documents}.jsonl"
        with lines.open("w") as file:
            for i in range(num_documents):
                file.write(json.dumps({"text": f"{i} " + "x" * 20_000}) + "\n")
        tracemalloc.start()
        prepared(lines, tmp_path / f"out{num_documents}")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(20)  # whatever is loaded once
    assert peak_bytes(400) < peak_bytes(100) + 300_000  # 400 documents hold 8 MB of text


def test_command_line(corpus, tmp_path, capsys):
    (corpus / "empty.txt").write_text("")
    (corpus / "notes.md").write_text("not wanted")
    (corpus / "secret.txt").write_text("not wanted either")
    filters = ["--suffix", ".txt", "--exclude", "secret.txt", "--skip-unreadable"]
    run(parse(corpus, *TO_BYTES, tmp_path / "out", "--validation-fraction", "0.3", *filters))
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "validation")) == sorted(TEXTS)
    read, skipped, train, train_lengths, validation, _, written = capsys.readouterr().out.splitlines()
    num_train = len(documents(tmp_path / "out", "train"))
    assert train.startswith(f"train       {num_train} documents, ")
    assert validation.startswith(f"validation  {40 - num_train} documents, ")
    assert "0.95 bytes per token" in train
    assert read == "files       41 .txt"
    assert skipped.startswith("skipped     1 unreadable documents, the first: ")
    assert "empty.txt is empty" in skipped
    meta = json.loads((tmp_path / "out" / "train" / "meta.json").read_text())
    assert f"median {meta['median_tokens']}, longest {meta['longest_tokens']} tokens; " in train_lengths
    assert str(tmp_path / "out") in written


def test_command_line_defaults():
    args = parse("a", "b", "--tokenizer", "t.json", "--out", "o")
    assert ([str(path) for path in args.paths], args.text_key, args.suffix, args.exclude) == (
        ["a", "b"],
        "text",
        None,
        [],
    )
    assert (args.validation_fraction, args.validation_from_ends) == (0.05, False)
    assert (args.skip_unreadable, args.overwrite, args.end_token) == (False, False, None)


@pytest.mark.parametrize(
    ("old", "new"), [("--held-out 0.1", "--validation-fraction"), ("--hold-out-ends", "--validation-from-ends")]
)
def test_flags_of_earlier_versions_are_refused_with_the_new_name(capsys, old, new):
    with pytest.raises(SystemExit):
        parse("a", *TO_BYTES, "o", *old.split())
    assert f"{old.split()[0]} was renamed to {new}\n" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_run_leaves_things_as_they_were(corpus, tmp_path, monkeypatch, error, earlier):
    out = tmp_path / "out"
    if earlier:
        prepared(corpus, out)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    calls = 0
    append = module.SplitWriter.append

    def fail_late(self, ids):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise error
        append(self, ids)

    monkeypatch.setattr(module.SplitWriter, "append", fail_late)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError
    with pytest.raises(expected, match=None if earlier or expected is KeyboardInterrupt else r"out cannot be written"):
        prepared(corpus, out, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_corrupt_input_leaves_nothing(corpus, tmp_path):
    (corpus / "999.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"999\.txt is not UTF-8"):
        prepared(corpus, tmp_path / "deep" / "out")
    assert list(tmp_path.rglob("*.bin")) == []
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failing_rename_brings_the_earlier_result_back(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepared(corpus, out)
    rename = module.Path.rename

    def fail_for_partial(self, target):
        if self.name == "data":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(module.Path, "rename", fail_for_partial)
    with pytest.raises(DataError, match=r"out cannot be written: Input/output error"):
        prepared(corpus, out, 0.5, overwrite=True)
    assert TokenSource(out / "train").fingerprint == first.train.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_an_existing_result_needs_overwrite(corpus, tmp_path):
    out = tmp_path / "out"
    prepared(corpus, out)
    with pytest.raises(DataError, match=r"out exists already; .*--overwrite"):
        prepare([corpus], tokenizer=BYTES, out=out)
    report = prepared(corpus, out, 0.6, overwrite=True)
    assert TokenSource(out / "train").fingerprint == report.train.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_overwrite_never_deletes_a_corpus(corpus):
    with pytest.raises(DataError, match=r"\.txt is not a result"):
        prepared(corpus, corpus, overwrite=True)
    with pytest.raises(DataError, match=r"000\.txt is not a result"):
        prepared(corpus, corpus / "000.txt", overwrite=True)
    assert len(list(corpus.iterdir())) == len(TEXTS)


def test_a_result_inside_the_corpus_is_not_read_back(corpus):
    first = prepared(corpus, corpus / "out")
    again = prepared(corpus, corpus / "out", overwrite=True)
    assert again.train == first.train


def test_lengths_are_in_the_meta(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (9, 99, 4095, 40_000)))
    report = prepared(lines, tmp_path / "out", validation_from_ends=True, fraction=1e-9)
    lengths = [9, 99, 4095, 40_000]  # without the last character, with the end token
    share = {n: sum(length for length in lengths if length >= n) / sum(lengths) for n in (4096, 32768, 131072)}
    assert (report.train.median_tokens, report.train.longest_tokens) == ((99 + 4095) // 2, 40_000)
    assert report.train.long_documents == {str(n): part for n, part in share.items()}


def test_a_book_of_wide_characters_is_split_between_characters(tmp_path):
    for text, train in (("漢", 1), ("漢字", 1), ("漢字漢字漢字漢字漢字", 9)):
        (tmp_path / "book.txt").write_text(text, encoding="utf-8")
        out = tmp_path / f"out{len(text)}"
        if len(text) == 1:
            with pytest.raises(DataError, match="single character"):
                prepared(tmp_path / "book.txt", out, 0.1, validation_from_ends=True)
            continue
        prepared(tmp_path / "book.txt", out, 0.1, validation_from_ends=True)
        assert (documents(out, "train"), documents(out, "validation")) == ([text[:train]], [text[train:]])
