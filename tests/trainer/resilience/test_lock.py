"""One run per folder, by real processes; a file system without locks between nodes is one whose flock always grants."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from farspan.errors import ConfigError
from farspan.trainer.resilience import lock
from farspan.trainer.resilience.lock import lock_folder

OWNER = """
import socket, sys, time
from pathlib import Path
from farspan.trainer.resilience import lock
folder, job, host, beat_s, has_locks = sys.argv[1:]
lock.BEAT_S = float(beat_s)
socket.gethostname = lambda: host
if has_locks == "False":
    lock.fcntl.flock = lambda file, operation: None
lock_of_folder = lock.lock_folder(Path(folder), job or None)
print("locked", flush=True)
sys.stdin.read()
lock_of_folder.close()
"""


@contextmanager
def owner(
    folder: Path, *, job: str = "", host: str = socket.gethostname(), beat_s: float = 60, has_locks: bool = True
) -> Iterator[subprocess.Popen[str]]:
    """A process with the lock of the folder."""
    command = [sys.executable, "-c", OWNER, str(folder), job, host, str(beat_s), str(has_locks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "new"
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("another job is not waited for"))
    with owner(folder, job="17_3") as process:
        host = socket.gethostname()
        with pytest.raises(ConfigError, match=rf"run\.folder='{folder}' .* {process.pid} on {host}, job 17_3: stop"):
            lock_folder(folder, "18")
    # However it ends, the lock is free again.
    with lock_folder(folder), pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on {host}: stop"):
        lock_folder(folder)
    assert (folder / "lock").read_text() == "", "who comes next has nobody to watch"
    lock_folder(folder).close()


def test_a_job_waits_for_its_previous_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path, job="17") as process:
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: process.send_signal(signal.SIGKILL))
        with lock_folder(tmp_path, "17"):
            assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    with owner(tmp_path, job="17"):
        monkeypatch.undo()
        monkeypatch.setattr(lock, "PATIENCE_S", 0)
        with pytest.raises(ConfigError, match=r"is in use by .*, job 17: stop that run first"):
            lock_folder(tmp_path, "17")


def test_without_locks_between_nodes_the_owner_is_seen_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.fcntl, "flock", lambda file, operation: None)
    monkeypatch.setattr(lock, "WATCH_S", 20)
    with owner(tmp_path, host="other", beat_s=0.05, has_locks=False):
        for job in (None, "18"):
            with pytest.raises(ConfigError, match=r"is in use by process \d+ on other: stop"):
                lock_folder(tmp_path, job)
    # It is dead, and its name is still there.
    assert "on other" in (tmp_path / "lock").read_text()
    monkeypatch.setattr(lock, "WATCH_S", 0.3)
    lock_folder(tmp_path).close()


def test_without_any_locks_the_owner_is_watched_on_this_host_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "WATCH_S", 20)
    with owner(tmp_path, beat_s=0.05):
        monkeypatch.setattr(lock.fcntl, "flock", mock.Mock(side_effect=OSError(95, "Operation not supported")))
        with pytest.raises(ConfigError, match="is in use by process "):
            lock_folder(tmp_path)
    assert "its file system has no locks (Operation not supported)" in caplog.text


def test_with_locks_nobody_is_watched_on_the_same_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path):
        pass
    assert "process " in (tmp_path / "lock").read_text()
    monkeypatch.setattr(lock, "_is_touched", lambda path: pytest.fail("a start would take longer for nothing"))
    lock_folder(tmp_path).close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.folder='.*file/run' cannot be written \(Not a directory\)"):
        lock_folder(tmp_path / "file" / "run")


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.os, "write", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\): make room, change"):
        lock_folder(tmp_path)
