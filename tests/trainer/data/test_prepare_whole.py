"""`prepare` leaves a whole result or none, and never harms what was there."""

import pytest

from farspan.errors import DataError
from farspan.trainer.data import prepare as module
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
NUM_FILES = 40


@pytest.fixture
def corpus(tmp_path):
    """Return a folder of small text files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(NUM_FILES):
        (folder / f"{i:03}.txt").write_text(f"document {i}")
    return folder


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_run_leaves_things_as_they_were(corpus, tmp_path, monkeypatch, error, earlier):
    out = tmp_path / "out"
    if earlier:
        prepare([corpus], tokenizer=BYTES, out=out, validation_fraction=0.3)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    calls = 0
    add = module.SplitWriter.add

    def fail_late(self, ids, *, num_bytes):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise error
        add(self, ids, num_bytes=num_bytes)

    monkeypatch.setattr(module.SplitWriter, "add", fail_late)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError
    with pytest.raises(expected, match=None if earlier or expected is KeyboardInterrupt else r"out cannot be written"):
        prepare([corpus], tokenizer=BYTES, out=out, validation_fraction=0.3, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_corrupt_input_leaves_nothing(corpus, tmp_path):
    (corpus / "999.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"999\.txt is not UTF-8"):
        prepare([corpus], tokenizer=BYTES, out=tmp_path / "deep" / "out", validation_fraction=0.3)
    assert list(tmp_path.rglob("*.bin")) == []
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failing_rename_brings_the_earlier_result_back(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = prepare([corpus], tokenizer=BYTES, out=out, validation_fraction=0.3)
    rename = module.Path.rename

    def fail_for_partial(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(module.Path, "rename", fail_for_partial)
    with pytest.raises(DataError, match=r"out cannot be written: Input/output error"):
        prepare([corpus], tokenizer=BYTES, out=out, validation_fraction=0.5, overwrite=True)
    assert TokenSource(out / "train").fingerprint == first.train.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_an_existing_result_needs_overwrite(corpus, tmp_path):
    out = tmp_path / "out"
    prepare([corpus], tokenizer=BYTES, out=out, validation_fraction=0.3)
    with pytest.raises(DataError, match=r"out exists already; pass another --out, or --overwrite"):
        prepare([corpus], tokenizer=BYTES, out=out)
    report = prepare([corpus], tokenizer=BYTES, out=out, validation_fraction=0.6, overwrite=True)
    assert TokenSource(out / "train").fingerprint == report.train.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_overwrite_never_deletes_a_corpus(corpus):
    with pytest.raises(DataError, match=r"\.txt is no result of an earlier prepare"):
        prepare([corpus], tokenizer=BYTES, out=corpus, validation_fraction=0.3, overwrite=True)
    with pytest.raises(DataError, match=r"000\.txt is no result of an earlier prepare"):
        prepare([corpus], tokenizer=BYTES, out=corpus / "000.txt", validation_fraction=0.3, overwrite=True)
    assert len(list(corpus.iterdir())) == NUM_FILES


def test_a_result_inside_the_corpus_is_not_read_back(corpus):
    first = prepare([corpus], tokenizer=BYTES, out=corpus / "out", validation_fraction=0.3)
    again = prepare([corpus], tokenizer=BYTES, out=corpus / "out", validation_fraction=0.3, overwrite=True)
    assert again.train == first.train
