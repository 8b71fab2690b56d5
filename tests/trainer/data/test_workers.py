"""Several processes write what one does, and a dead one is named."""

import multiprocessing
import os
import signal

import pytest

from farspan.errors import DataError
from farspan.trainer.data import pieces, workers
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.readers import DocumentReader
from farspan.trainer.data.source import SPLITS, TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One that puts something before each text, so that all pieces but the first have context."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.normalizer = tokenizers.normalizers.Prepend("_")
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["</s>", "<s>"])
    raw.train_from_iterator(["the cat sat on the mat 0123456789 " * 9], trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return load_tokenizer(str(path))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Return a folder of short texts and a long one, which takes many pieces."""
    for module in (pieces, workers):
        monkeypatch.setattr(module, "PIECE_BYTES", 200)
    (tmp_path / "corpus").mkdir()
    for number in range(30):
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(f"cat {number} sat on mat " * (200 if number == 7 else 2))
    return tmp_path / "corpus"


def started():
    return [process.pid or 0 for process in multiprocessing.active_children() if process.name.startswith("Spawn")]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("count", "from_ends"), [(2, True), (3, False)])
def test_any_number_of_workers_writes_the_same_bytes(corpus, tmp_path, tokenizer, count, from_ends):
    for workers_started in (1, count):
        out = tmp_path / f"out{workers_started}"
        prepare(
            [corpus],
            tokenizer=tokenizer,
            out=out,
            validation_fraction=0.3,
            validation_from_ends=from_ends,
            workers=workers_started,
        )
        assert contents(out) == contents(tmp_path / "out1")
    assert started() == []


@pytest.mark.parametrize("count", [1, 2])
def test_documents_have_the_tokens_of_their_texts(corpus, tmp_path, tokenizer, count):
    prepare([corpus], tokenizer=tokenizer, out=tmp_path / "out", validation_fraction=0.3, workers=count)
    found = []
    for split in SPLITS:
        source = TokenSource(tmp_path / "out" / split)
        found += [source.document(number).tolist() for number in range(source.num_documents)]
    texts = [path.read_text() for path in corpus.iterdir()]
    assert sorted(found) == sorted(
        [*tokenizer.start_ids, *tokenizer.encode(text).tolist(), tokenizer.end_id] for text in texts
    )
    assert max(map(len, found)) > 10 * min(map(len, found))


def test_a_worker_that_dies_is_named(corpus, tmp_path, tokenizer, monkeypatch):
    read = DocumentReader.__iter__

    def with_a_kill(self):
        for number, document in enumerate(read(self)):
            if number == 20:
                first, _ = started()
                os.kill(first, signal.SIGKILL)
            yield document

    monkeypatch.setattr(DocumentReader, "__iter__", with_a_kill)
    with pytest.raises(DataError, match=r"^Worker \d of 2 \(process \d+\) was killed by SIGKILL.* at .*\.txt: start"):
        prepare([corpus], tokenizer=tokenizer, out=tmp_path / "out", validation_fraction=0.3, workers=2)
    assert started() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_document_that_a_worker_cannot_encode_is_named(corpus, tmp_path, count):
    (corpus / "07.txt").unlink()  # a long text is encoded in this process too, to cut it
    path = tmp_path / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0}, unk_token="<unk>")).save(str(path))
    with pytest.raises(DataError, match=r"00\.txt: The tokenizer .*words\.json cannot encode"):
        prepare([corpus], tokenizer=load_tokenizer(str(path)), out=tmp_path / "out", workers=count)


def test_no_worker_is_refused(corpus, tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"--workers 0 must be at least 1"):
        prepare([corpus], tokenizer=tokenizer, out=tmp_path / "out", workers=0)
