"""The split on disk: round trip, and every kind of damage refused by file name."""

import json

import numpy as np
import pytest

from farspan.errors import DataError
from farspan.trainer.data.source import SplitWriter, TokenSource, share_of_tokens, token_dtype
from farspan.trainer.data.tokenizer import load_tokenizer

DOCUMENTS = [b"abracadabra", b"", b"xyz" * 9, b"a"]


@pytest.fixture
def folder(tmp_path):
    """Return a split of DOCUMENTS."""
    with SplitWriter(tmp_path / "train", tokenizer=load_tokenizer("bytes")) as writer:
        for data in DOCUMENTS:
            writer.add(np.frombuffer(data, dtype=np.uint8), num_bytes=len(data))
        writer.finish()
    return tmp_path / "train"


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value != "drop"}))


def test_round_trip(folder):
    source = TokenSource(folder)
    stream = [token for data in DOCUMENTS for token in [*data, 256]]
    assert source.tokens.tolist() == stream
    assert source.tokens.dtype == np.uint16
    assert source.offsets.tolist() == [0, 12, 13, 41, 43]
    assert [source.document(i).tolist() for i in range(4)] == [[*data, 256] for data in DOCUMENTS]
    assert (source.num_documents, source.num_tokens, source.num_bytes) == (4, 43, 39)
    assert (source.vocabulary_size, source.end_id) == (257, 256)
    assert source.fingerprint == json.loads((folder / "meta.json").read_text())["fingerprint"]


def test_documents_outside_raise_index_error(folder):
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"document {index} of 4"):
            TokenSource(folder).document(index)


def test_arrays_are_read_only(folder):
    source = TokenSource(folder)
    for array in (source.tokens, source.offsets, source.document(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(("vocabulary_size", "name"), [(257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_token_dtype(vocabulary_size, name):
    dtype = token_dtype(vocabulary_size)
    assert dtype.name == name
    assert np.array([vocabulary_size - 1]).astype(dtype)[0] == vocabulary_size - 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", lambda data: data[:-1]),
        ("tokens.bin", lambda data: data[:-2]),
        ("tokens.bin", lambda data: data + b"\0\0"),
        ("tokens.bin", lambda data: b""),
        ("tokens.bin", lambda data: data[2:] + data[:2]),
        ("offsets.npy", lambda data: data[:-1]),
        ("offsets.npy", lambda data: data[:-8]),
        ("offsets.npy", lambda data: data[:20]),
        ("offsets.npy", lambda data: b""),
        ("offsets.npy", lambda data: b"noise" * 40),
        ("meta.json", lambda data: data[: len(data) // 2]),
        ("meta.json", lambda data: b""),
        ("meta.json", lambda data: b"[1]"),
        ("meta.json", lambda data: b"\xff"),
    ],
)
def test_damaged_files_are_refused(folder, name, damage):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{name}.*; prepare the folder again with `farspan data prepare`"):
        TokenSource(folder)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "meta.json"])
def test_missing_files_are_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} .*(does not exist|No such file)"):
        TokenSource(folder)


def test_the_folder_above_is_refused_with_the_right_one(folder):
    with pytest.raises(DataError, match=r"meta\.json does not exist; open .*train\."):
        TokenSource(folder.parent)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 12, 13, 41, 42], "from 0 to 42, not from 0 to num_tokens=43"),
        ([1, 12, 13, 41, 43], "from 1 to 43, not from 0"),
        ([0, 13, 12, 41, 43], "does not rise"),
        ([0, 12, 12, 41, 43], "does not rise"),
        ([0, 12, 13, 43], r"is not int64 \[5\]"),
        ([[0, 12, 13, 41, 43]], r"is not int64 \[5\]"),
        ([0.0, 12.0, 13.0, 41.0, 43.0], r"is not int64 \[5\]"),
    ],
)
def test_mismatching_offsets_are_refused(folder, offsets, message):
    np.save(folder / "offsets.npy", np.array(offsets))
    with pytest.raises(DataError, match=rf"offsets\.npy.*{message}"):
        TokenSource(folder)


def test_pickled_offsets_are_refused(folder):
    np.save(folder / "offsets.npy", np.array([None] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"offsets\.npy is cut or corrupt"):
        TokenSource(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "is of format version 2 but this farspan reads 1"),
        ({"format_version": "drop"}, "is of format version None"),
        ({"num_tokens": "drop"}, "num_tokens=None, not of the right type"),
        ({"num_tokens": 43.0}, "num_tokens=43.0, not of the right type"),
        ({"num_bytes": True}, "num_bytes=True, not of the right type"),
        ({"num_bytes": 0}, "impossible counts"),
        ({"num_documents": 0}, "impossible counts"),
        ({"dtype": "uint32"}, "does not fit dtype"),
        ({"dtype": "float64"}, "does not fit dtype"),
        ({"end_id": 257}, "does not fit dtype and end_id"),
    ],
)
def test_impossible_meta_is_refused(folder, changes, message):
    change_meta(folder, **changes)
    with pytest.raises(DataError, match=rf"meta\.json.*{message}"):
        TokenSource(folder)


@pytest.mark.parametrize(
    ("changes", "name"), [({"num_tokens": 44}, "tokens.bin|offsets.npy"), ({"end_id": 5}, "tokens.bin")]
)
def test_meta_of_another_split_is_refused(folder, changes, name):
    change_meta(folder, **changes)
    with pytest.raises(DataError, match=name):
        TokenSource(folder)


def test_a_folder_of_before_statistics_opens(folder):
    new = ("tokenizer_sha256", "median_tokens", "longest_tokens", "long_documents")
    change_meta(folder, **dict.fromkeys(new, "drop"))
    source = TokenSource(folder)
    assert [getattr(source.meta, name) for name in new] == [None] * 4
    assert source.document_lengths().tolist() == [12, 1, 28, 2]
    assert [share_of_tokens(source.document_lengths(), n) for n in (1, 12, 13, 29)] == [1, 40 / 43, 28 / 43, 0]
