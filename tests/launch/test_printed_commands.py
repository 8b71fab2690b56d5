"""Commands that farspan prints can be pasted into a shell, whatever the paths in them are."""

import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from farspan.errors import FarspanError
from farspan.launch.commands.jobs import log_file, status_command
from farspan.launch.commands.models import _log_written
from farspan.launch.slurm.history import ExclusionPolicy, Submission, add_submission
from farspan.launch.slurm.requeue import JobStart
from farspan.launch.slurm.submit import resume
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.resolve import open_data
from farspan.trainer.train import log_end
from tests.support import tiny
from tests.support.programs import install

NAME = "it's $HOME; a & b"


def renamed(folder: Path) -> None:
    (folder / "held_out").mkdir(parents=True)
    (folder / "held_out/meta.json").touch()
    open_data(tiny.config(folder, folder, ParallelConfig()))


def one_split(folder: Path) -> None:
    folder.mkdir()
    (folder / "meta.json").touch()
    open_data(tiny.config(folder, folder, ParallelConfig()))


def without_log(folder: Path) -> None:
    folder.mkdir()
    add_submission(folder, Submission(job="17", script="s"))
    log_file(folder, None)


def again(folder: Path) -> None:
    folder.mkdir()
    add_submission(folder, Submission(job="17", script="s"))
    resume(folder, ExclusionPolicy(hours=1, max_nodes=1))


def hint(folder: Path) -> str:
    limits = ExclusionPolicy(hours=1, max_nodes=1)
    start = JobStart(run=folder, job="1", restarts=0, script=folder, requeues=1, max_failures=1, exclusion=limits)
    return start.resume_hint()


def ended(folder: Path) -> None:
    log_end(tiny.config(folder, folder, ParallelConfig()), 10, is_finished=True, has_work=True)


@pytest.mark.parametrize(
    ("work", "pattern", "words"),
    [
        (ended, r"view +(.+)$", ["--logdir", "FOLDER/tensorboard"]),
        (hint, r"`(.+)`$", ["farspan", "jobs", "resume", "FOLDER"]),
        (status_command, r"`(.+)`$", ["farspan", "jobs", "status", "FOLDER"]),
        (without_log, r"`(.+)`\.$", ["farspan", "jobs", "status", "FOLDER"]),
        (again, r"`(.+)`\.$", ["farspan", "jobs", "cancel", "FOLDER"]),
        (lambda folder: _log_written("made", folder), r"from it with (.+)$", ["run.start_from=FOLDER"]),
        (renamed, r"`(.+)`\.$", ["mv", "FOLDER/held_out", "FOLDER/validation"]),
        (one_split, r": set (.+)\.$", ["data.folder=PARENT"]),
    ],
    ids=["tensorboard", "resume", "status", "no log", "cancel", "start_from", "mv", "data.folder"],
)
def test_a_printed_command_is_quoted(
    work: Callable[[Path], str | None],
    pattern: str,
    words: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "PATH", str(install(tmp_path / "bin", squeue='[ $6 != -o ] || echo "17|RUNNING|1|2|n||None"')), ":"
    )
    folder = tmp_path / NAME / "run"
    folder.parent.mkdir()
    with caplog.at_level(logging.INFO, logger="farspan"):
        try:
            said = work(folder)
        except FarspanError as error:
            said = str(error)
    found = re.search(pattern, said or caplog.messages[-1])
    assert found, said or caplog.messages
    expected = [word.replace("FOLDER", str(folder)).replace("PARENT", str(folder.parent)) for word in words]
    assert shlex.split(found[1])[-len(words) :] == expected
