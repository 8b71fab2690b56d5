"""The output folder: whole or not there, however a process ends, and one process at a time."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from farspan.errors import DataError
from farspan.trainer.data import output
from farspan.trainer.data import prepare as prepare_module
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer
from tests.support.bpe import byte_level_bpe
from tests.support.durability import syncs_and_renames
from tests.support.processes import wait_for

BYTES = load_tokenizer("bytes")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("once upon a time")
    return tmp_path / "text.txt"


def prepared(path, out, **options):
    return prepare([path], tokenizer=BYTES, out=out, validation_from_ends=True, **options)


def test_the_folder_has_its_name_when_its_files_are_on_the_disk(tmp_path, text):
    byte_level_bpe([text.read_text()], vocabulary_size=300, special=["</s>"]).save(str(tmp_path / "bpe.json"))
    with syncs_and_renames() as events:
        prepare(
            [text],
            tokenizer=load_tokenizer(str(tmp_path / "bpe.json")),
            out=tmp_path / "out",
            validation_from_ends=True,
        )
    files = Counter(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files >= Counter({"tokens.bin": 2, "meta.json": 2, "token_bytes.npy": 1, "tokenizer.json": 1})
    assert files <= Counter(name for kind, name in events[: events.index(("rename", "out"))] if kind == "sync")


@pytest.fixture
def waiting(tmp_path):
    """A process that prepares tmp_path/out and waits for the end of its input."""
    os.mkfifo(tmp_path / "pipe")
    words = ["farspan.launch.cli", "data", "prepare", str(tmp_path / "pipe"), "--tokenizer", "bytes", "--workers", "2"]

    def default_signals():  # a hangup that is ignored, as under nohup, is inherited
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-m", *words, "--validation-from-ends", "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    ) as process:
        try:
            wait_for((tmp_path / ".out.partial" / "lock").exists, "a partial folder")
            wait_for((tmp_path / ".out.partial" / "lock").read_text, "an owner")
            yield process
        finally:
            process.kill()


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_removes_what_was_begun(tmp_path, waiting, number):
    waiting.send_signal(number)
    _, errors = waiting.communicate()
    assert (waiting.returncode, errors) == (130, "")
    assert hidden(tmp_path) == []
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, waiting, text, caplog):
    caplog.set_level("INFO", logger="farspan")
    with pytest.raises(DataError, match=rf"\.out\.partial is in use by process {waiting.pid} on .*another --out"):
        prepared(text, tmp_path / "out")
    (tmp_path / ".out.partial" / "data").mkdir(exist_ok=True)
    waiting.kill()
    waiting.wait()
    assert hidden(tmp_path) == [".out.partial"]
    prepared(text, tmp_path / "out")
    assert f"removed     {tmp_path}/.out.partial, which an interrupted prepare left" in caplog.text
    assert hidden(tmp_path) == []


def test_an_earlier_result_that_was_moved_away_comes_back(tmp_path, text):
    first = prepared(text, tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / "out").rename(tmp_path / ".out.partial" / "earlier")
    with pytest.raises(DataError, match=r"out exists already"):
        prepared(text, tmp_path / "out")
    assert TokenSource(tmp_path / "out" / "train").fingerprint == first.train.fingerprint
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("is_new", [True, False])
def test_without_locks_an_unknown_partial_folder_is_refused(tmp_path, text, monkeypatch, is_new):
    def no_locks(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(output.fcntl, "flock", no_locks)
    if is_new:
        prepared(text, tmp_path / "out")
        assert hidden(tmp_path) == []
        return
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(DataError, match=r"\.out\.partial exists on a file system without locks .*: remove it"):
        prepared(text, tmp_path / "out")
    assert hidden(tmp_path) == [".out.partial"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path, text, monkeypatch):
    def appears(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()

    monkeypatch.setattr(prepare_module, "_write_tokenizer", appears)
    with pytest.raises(DataError, match=r"out cannot be written: Directory not empty"):
        prepared(text, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    assert hidden(tmp_path) == []


def test_the_root_folder_is_refused(text):
    with pytest.raises(DataError, match=r"^/ (exists already|cannot be written)"):
        prepared(text, "/")
