"""Readers: order, exact text, and every refusal by message and file name."""

import json
import os
import re
import sys
from unittest import mock

import pytest

from farspan.errors import DataError
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
