"""Readers: order, exact text, and every refusal by message and file name."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import tarfile
from functools import partial
from unittest import mock

import pytest

from farspan.errors import DataError
from farspan.trainer.data import readers
from farspan.trainer.data.readers import DocumentReader


def texts(*paths, **options):
    return [document.text.decode() for document in DocumentReader(paths, **options)]


def names(root, *paths, **options):
    return [os.path.relpath(document.origin, root) for document in DocumentReader(paths, **options)]


@pytest.fixture
def tree(tmp_path):
    """Return a folder with files to take, to hide and to exclude; each holds its own name."""
    files = ["b.py", "a.txt", "sub/c.py", "sub/deep/d.md", ".hidden/e.py", ".f.py", "__pycache__/g.py", "z/tests/h.py"]
    for name in files:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_text_is_kept_to_the_byte(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("a\r\nb\x00\ufeffé\n".encode())
    (document,) = DocumentReader([path])
    assert document.text == path.read_bytes()
    assert document.origin == str(path)


def test_folder_is_recursive_sorted_and_skips_hidden(tree):
    assert names(tree, tree) == ["a.txt", "b.py", "sub/c.py", "sub/deep/d.md", "z/tests/h.py"]
    assert texts(tree) == names(tree, tree)


def test_suffixes_and_exclude_choose_inside_folders(tree):
    assert names(tree, tree, suffixes=[".py"]) == ["b.py", "sub/c.py", "z/tests/h.py"]
    assert names(tree, tree, suffixes=["py", ".md"]) == ["b.py", "sub/c.py", "sub/deep/d.md", "z/tests/h.py"]
    assert names(tree, tree, exclude=["tests", "*.txt"]) == ["b.py", "sub/c.py", "sub/deep/d.md"]
    assert names(tree, tree / "a.txt", suffixes=[".py"], exclude=["a.txt"]) == ["a.txt"]  # named, so wanted
    assert names(tree, tree, omit=tree / "sub") == ["a.txt", "b.py", "z/tests/h.py"]


def test_linked_files_are_read_and_linked_folders_are_not(tree):
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "sub" / "link.py").symlink_to(tree / "b.py")
    assert texts(tree / "sub") == ["sub/c.py", "sub/deep/d.md", "b.py"]


def test_paths_are_read_in_the_order_given_and_again(tree):
    reader = DocumentReader([tree / "sub", tree / "a.txt"])
    assert [d.text for d in reader] == [d.text for d in reader] == [b"sub/c.py", b"sub/deep/d.md", b"a.txt"]


def test_missing_paths_and_empty_folders_are_refused(tree, tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        texts(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tree holds no file ending in \.rs or \.go to read"):
        texts(tree, suffixes=[".rs", "go"])
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"void holds no file to read"):
        texts(tmp_path / "void", skip_unreadable=True)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"", r"x\.txt is empty"),
        ("x.txt", b"ab\xffcd", r"x\.txt is not UTF-8"),
        ("x.jsonl", b"", r"x\.jsonl is empty"),
        ("x.jsonl", b"\n \n", r"x\.jsonl is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl, line 2 is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"x\.jsonl, line 2 is not UTF-8"),
        ("x.jsonl", b'{"text": ""}\n', r"x\.jsonl, line 1: 'text' is empty"),
        ("x.jsonl", b'{"text": null}\n', r"x\.jsonl, line 1: 'text' is empty"),
        ("x.parquet", b"", r"x\.parquet is empty"),
    ],
)
def test_unreadable_is_refused_or_skipped(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "y.txt").write_text("good")
    for paths in ([tmp_path / name], [tmp_path]):
        with pytest.raises(DataError, match=message):
            texts(*paths)
    # A file that is named is skipped as one in a folder.
    for paths in ([tmp_path / name, tmp_path / "y.txt"], [tmp_path]):
        reader = DocumentReader(paths, skip_unreadable=True)
        for _ in range(2):  # the count is of one pass
            assert [d.text for d in reader][-1] == b"good"
            assert reader.num_skipped == 1
            assert reader.first_skipped is not None
            assert re.search(message, reader.first_skipped)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
def test_characters_lie_across_the_chunks_of_a_large_text(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    whole = "aé€𝄞" * 3
    (tmp_path / "x.txt").write_text(whole, encoding="utf-8")
    assert texts(tmp_path) == [whole]
    for missing in (1, 2, 3):
        (tmp_path / "x.txt").write_bytes(whole.encode()[:-missing])
        with pytest.raises(DataError, match=r"x\.txt is not UTF-8"):
            texts(tmp_path)


def test_broken_links_and_pipes_do_not_hang(tmp_path):
    (tmp_path / "y.txt").write_text("good")
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a\.txt is a broken link or no regular file"):
        texts(tmp_path)
    os.mkfifo(tmp_path / "b.txt")
    reader = DocumentReader([tmp_path], skip_unreadable=True)
    assert [d.text for d in reader] == [b"good"]
    assert reader.num_skipped == 2


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_failing_reads_are_named_even_when_skipping(tmp_path, monkeypatch, error):
    (tmp_path / "x.txt").write_text("x")
    monkeypatch.setattr("pathlib.Path.open", mock.Mock(side_effect=error))
    with pytest.raises(DataError, match=rf"x\.txt cannot be read: {error.strerror}"):
        texts(tmp_path, skip_unreadable=True)
    monkeypatch.setattr("os.scandir", mock.Mock(side_effect=error))
    with pytest.raises(DataError, match=rf"cannot be listed: {error.strerror}"):
        texts(tmp_path, skip_unreadable=True)


def test_jsonl_documents_and_origins(tmp_path):
    path = tmp_path / "x.jsonl"
    records = [{"text": "a\nb", "body": "1"}, {"body": "2 é", "text": "c\u2028d"}]
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    assert texts(path) == ["a\nb", "c\u2028d"]
    assert texts(path, text_key="body") == ["1", "2 é"]
    assert names(tmp_path, path) == ["x.jsonl, line 1", "x.jsonl, line 3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"x\.jsonl, line 2 is not JSON"),
        ("[" * 100_000, r"x\.jsonl, line 2 is not JSON"),
        ('["text"]', r"x\.jsonl, line 2 is not a JSON object"),
        ('{"txt": "a"}', r"x\.jsonl, line 2 has no key 'text', only 'txt'; .*--text-key\. Did you mean 'txt'"),
        ('{"text": 5}', r"x\.jsonl, line 2: 'text' is not a string"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_corrupt_jsonl_is_refused_by_line(tmp_path, line, message, skip):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=message):
        texts(tmp_path, skip_unreadable=skip)


def test_parquet_rows_over_many_batches(tmp_path):
    rows = [f"row {i} é" for i in range(150)]
    path = write_parquet(tmp_path / "x.parquet", {"id": list(range(150)), "text": rows}, row_group_size=70)
    assert texts(path) == rows
    assert names(tmp_path, path)[149] == "x.parquet, row 150"


def test_parquet_without_a_mark_of_text_is_read_as_utf8(tmp_path):
    write_parquet(tmp_path / "x.parquet", {"text": ["é".encode(), b"", b"\xff", None, b"two"]})
    with pytest.raises(DataError, match=r"x\.parquet, row 2: 'text' is empty"):
        texts(tmp_path)
    assert texts(tmp_path, skip_unreadable=True) == ["é", "two"]


def test_corrupt_parquet_is_refused(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"text": ["a" * 50, "b"], "n": [1, 2]}, compression="none")
    with pytest.raises(DataError, match=r"x\.parquet has no column 'texts', only 'text', 'n'; .*Did you mean 'text'"):
        texts(path, text_key="texts")
    with pytest.raises(DataError, match=r"x\.parquet, row 1: 'n' is not a string"):
        texts(path, text_key="n")
    content = path.read_bytes()
    for cut in (1, 5, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:-cut])
        with pytest.raises(DataError, match=r"x\.parquet is a truncated or corrupt parquet file"):
            texts(tmp_path, skip_unreadable=True)
    write_parquet(path, {"text": ["a", None, ""]})
    with pytest.raises(DataError, match=r"x\.parquet, row 2: 'text' is empty"):
        texts(path)
    reader = DocumentReader([tmp_path], skip_unreadable=True)
    assert [d.text for d in reader] == [b"a"]
    assert reader.num_skipped == 2


def test_parquet_without_rows_and_with_bad_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "x.parquet", {"text": pyarrow.array([], pyarrow.string())})
    with pytest.raises(DataError, match=r"x\.parquet is empty"):
        texts(path)
    bad = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    write_parquet(path, {"text": bad})
    with pytest.raises(DataError, match=r"x\.parquet, row 2 is not UTF-8"):
        texts(path)


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"x\.parquet needs the package pyarrow; `pip install -e '\.\[data\]'`"):
        texts(tmp_path)


def compressed(path, data):
    """Write a file, compressed as its suffix says; return its path."""
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    return path


LINES = b'{"text": "a"}\r\n\r\n{"text": "b \xc3\xa9"}\n'


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.zst", "X.JSONL.GZ", "x.ndjson.zst", "x.Jsonl.Zst"])
def test_compressed_lines(tmp_path, name):
    path = compressed(tmp_path / name, LINES)
    (tmp_path / "README.txt").write_text("read me")
    reader = DocumentReader([tmp_path], skip_unreadable=True)
    assert sorted(d.text.decode() for d in reader) == ["a", "b é", "read me"]
    assert reader.files == {name[1:].lower(): 1, ".txt": 1}
    assert names(tmp_path, path) == [f"{name}, line 1", f"{name}, line 3"]
    # Chosen by what is inside, or by the whole name.
    for suffix in (name[1:], name[1:].rpartition(".")[0], name.rpartition(".")[2]):
        assert texts(tmp_path, suffixes=[suffix]) == ["a", "b é"]


@pytest.mark.parametrize("name", ["x.txt.gz", "x.TXT.ZST", "x.gz"])
def test_compressed_text(tmp_path, name):
    assert texts(compressed(tmp_path / name, "\ufeffa\r\né".encode())) == ["a\r\né"]


def test_several_compressed_parts_in_a_row_are_one_file(tmp_path):
    for suffix in (".gz", ".zst"):
        parts = [compressed(tmp_path / f"{part}.jsonl{suffix}", LINES).read_bytes() for part in "ab"]
        whole = tmp_path / f"whole.jsonl{suffix}"
        whole.write_bytes(b"".join(parts))
        assert texts(whole) == ["a", "b é"] * 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:15], lambda data: b"{}" + data[2:]])
@pytest.mark.parametrize("skip", [False, True])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, damage, skip):
    path = compressed(tmp_path / f"x.jsonl{suffix}", LINES * 99)
    path.write_bytes(damage(path.read_bytes()))
    for inputs in (tmp_path, path):
        with pytest.raises(DataError, match=rf"x\.jsonl\{suffix} is a truncated or corrupt \{suffix} file"):
            texts(inputs, skip_unreadable=skip)


def test_compressed_data_under_another_name_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(gzip.compress(LINES))
    assert texts(path) == ["a", "b é"]
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"x\.jsonl is empty"):
        texts(path)


# Without the time, since the data are part of a test's name.
packed = partial(gzip.compress, mtime=0)


def tar_of(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("x.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("x.txt.bz2", bz2.compress(b"text"), "bzip2"),
        ("x.jsonl.xz", lzma.compress(b"text"), "xz"),
        ("x.zip", b"PK\x03\x04rest", "zip"),
        ("x.txt", b"\x04\x22\x4d\x18rest", "lz4"),
        ("x.tar.gz", packed(tar_of(b"text")), "tar"),
        ("x.tgz", packed(tar_of(b"text")), "tar"),
        ("x.tar", tar_of(b"text"), "tar"),
        ("x.jsonl.gz.gz", packed(packed(b"text")), "gzip"),
        ("x.arrow", b"ARROW1\0\0", "Arrow"),
        ("x.data", b"PAR1rest", "parquet"),
        ("x.parquet.gz", packed(b"PAR1rest"), "parquet"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_what_is_packed_otherwise_is_refused_and_never_skipped(tmp_path, name, data, kind, skip):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "README.txt").write_text("read me")
    with pytest.raises(DataError, match=rf"{name} holds {kind} data, not text; .*--exclude it"):
        texts(tmp_path, skip_unreadable=skip)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("x.json", LINES, ["a", "b é"]),
        ("x.JSON", b'\n{"text": "a"}', ["a"]),
        ("x.json", b'[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ("x.json", json.dumps([{"text": "a"}, {"text": "b"}], indent=2).encode(), ["a", "b"]),
        ("x.json", json.dumps({"id": 1, "text": "a\nb"}, indent=2).encode(), ["a\nb"]),
        ("x.json", b"\xef\xbb\xbf" + json.dumps([{"text": "a"}], indent=2).encode(), ["a"]),
        ("x.jsonl", b"\xef\xbb\xbf" + LINES, ["a", "b é"]),
        # Two files with a mark in a row.
        ("x.jsonl", (b"\xef\xbb\xbf" + LINES) * 2, ["a", "b é"] * 2),
        ("x.txt", "\ufeffa\ufeffb".encode(), ["a\ufeffb"]),
    ],
)
def test_json_in_all_its_forms_and_byte_order_marks(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"text": "a"', r"x\.json is neither JSON lines nor one JSON value"),
        (b"once upon a time", r"x\.json is neither JSON lines nor one JSON value"),
        (b'["a", "b"]', r"x\.json, element 1 is not a JSON object"),
        (b"5", r"x\.json is not a JSON object"),
        (b'[{"text": "a"}, {"body": 1, "id": 2}]', r"element 2 has no key 'text', only 'body', 'id'; .*--text-key"),
        (b"\xef\xbb\xbf", r"x\.json is empty"),
        (b"[]", r"x\.json is empty"),
        (b'[{"text": "\xff"}\n]', r"x\.json is not UTF-8"),
    ],
)
def test_json_that_holds_no_documents_is_refused(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match=message):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.txt.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_refused_or_skipped(tmp_path, name, encoding):
    data = '{"text": "once upon a time"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=rf"{name} is UTF-16 text or no text at all; convert it to UTF-8"):
        texts(tmp_path)
    (tmp_path / "y.txt").write_text("good")
    assert texts(tmp_path, skip_unreadable=True) == ["good"]


def test_the_keys_and_columns_that_there_are_are_listed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({f"k{i}": "" for i in range(30)}))
    with pytest.raises(DataError, match=r"no key 'text', only 'k0', 'k1', .*'k19' and 10 more; name"):
        texts(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"no key 'text', nor any other; fix it"):
        texts(path)


def test_a_linked_folder_that_is_left_out_is_named(tree, caplog):
    caplog.set_level("INFO", logger="farspan")
    (tree / "sub" / "loop").symlink_to(tree)
    texts(tree / "sub")
    assert "loop, a linked folder: name it as an input to read it" in caplog.text
    assert texts(tree / "sub" / "loop") == texts(tree)


def test_missing_pyarrow_is_named_for_zstd(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"x\.jsonl\.zst needs the package pyarrow; `pip install -e '\.\[data\]'`"):
        texts(tmp_path, skip_unreadable=True)
