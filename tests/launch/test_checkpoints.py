"""`farspan checkpoint` on the folder of a run with three checkpoints."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farspan.launch import cli
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.checkpoint import verify
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.config import CheckpointConfig
from farspan.trainer.resilience.lock import lock_folder
from farspan.trainer.toml_config import to_toml
from tests.support import tiny
from tests.support.checkpoint_ranks import files, flip, save


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    config = tiny.config(folder / "none", folder / "run", ParallelConfig())
    config = replace(config, checkpoint=CheckpointConfig(keep=3, permanent_every_steps=20))
    with connected(Ranks(), torch.device("cpu")):
        save(config, [10, 20, 30])
    (folder / "run" / "config.toml").write_text(to_toml(config))
    return folder / "run"


@pytest.fixture
def run(saved_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def farspan(*arguments: object) -> int:
    return cli.main(["checkpoint", *map(str, arguments)])


def test_ls_prints_a_line_for_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_00000030" / "__0_0.distcp").unlink()
    (run / "checkpoints" / "step_00000020").rename(run / "checkpoints" / "refused_step_00000020")
    assert farspan("ls", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "saved", "size", "files", "tokens"]
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf" *10  {when}  \d+ KiB  +2 +1,000", lines[1])
    assert re.fullmatch(rf" *30  {when} +is damaged \(__0_0.distcp is missing\): restore.*", lines[2])
    assert re.fullmatch(rf" *20  {when}  \d+ KiB  +2 +2,000  +refused", lines[3])


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = verify.check_complete

    def slow(path: Path) -> Manifest:
        shutil.rmtree(run / "checkpoints" / "step_00000020", ignore_errors=True)
        return check(path)

    monkeypatch.setattr(verify, "check_complete", slow)
    assert farspan("verify", run) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["complete", "deleted", "complete"]
    assert farspan("verify", run / "checkpoints" / "step_00000020") == 1


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert farspan("verify", run) == 0
    complete = r"^complete    .*step_000000[123]0, [\d,]+ bytes in 2 files$"
    assert len(re.findall(complete, capsys.readouterr().out, re.MULTILINE)) == 3
    step = run / "checkpoints" / "step_00000020"
    flip(step / "__0_0.distcp", 5000)
    assert farspan("verify", run) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["complete", "damaged", "complete"]
    assert "step_00000020 is damaged (__0_0.distcp " in lines[1]
    assert farspan("verify", step) == 1
    assert farspan("verify", step.with_name("step_00000010")) == 0


def test_prune_keeps_the_newest_and_the_permanent(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "checkpoints" / "step_00000030", run / "checkpoints" / "refused_step_00000040")
    assert farspan("prune", run, "--keep", 1) == 0
    assert files(run / "checkpoints") == ["step_00000020", "step_00000030"]
    deleted = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()]
    assert deleted == ["step_00000010", "refused_step_00000040"]
    for _ in range(2):
        assert farspan("prune", run, "--keep", 1, "--permanent-every-steps", 0) == 0
    assert files(run / "checkpoints") == ["step_00000030"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("deleted     nothing")


def test_prune_deletes_nothing_if_the_run_or_its_newest_checkpoint_is_at_risk(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run / "checkpoints")
    with lock_folder(run):
        assert farspan("prune", run, "--keep", 1) == 2
    assert "is in use by" in capsys.readouterr().err
    flip(run / "checkpoints" / "step_00000030" / "__0_0.distcp", 5000)
    assert farspan("prune", run, "--keep", 1) == 2
    assert "step_00000030 is damaged" in capsys.readouterr().err
    assert farspan("prune", run, "--keep", 0) == 2
    assert farspan("prune", run, "--keep", 1, "--permanent-every-steps", -1) == 2
    assert files(run / "checkpoints") == before


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["ls"], ["verify"], ["prune", "--keep", "1", "--permanent-every-steps", "0"]):
        assert farspan(*command, tmp_path) == 2
        assert f"{tmp_path} has no finished checkpoint" in capsys.readouterr().err
    (tmp_path / "step_00000001").mkdir()
    assert farspan("verify", tmp_path / "step_00000001") == 1
