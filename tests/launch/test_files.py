"""Files and folders that a command cannot use: one sentence that names them and status 2, whichever command it is."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.resilience.agreement import on_first_rank, raise_on_all_ranks
from farspan.trainer.toml_config import to_toml
from tests.support import tiny

# Root may read and write everything, unless it gives these rights up.
UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"] if os.geteuid() == 0 else []
pytestmark = pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="needs setpriv")

# In one process, as each start imports for seconds. {locked} is a folder without any rights.
COMMANDS = [
    "train run.toml data.folder={locked}",
    "train run.toml run.folder={locked}/run",
    "train run.toml run.start_from={locked}",
    "train run.toml run.replay={locked}",
    "train {locked}/run.toml",
    "train run.toml data.folder={locked} --dry-run",
    "launch local run.toml --gpus-per-node 2 data.folder={locked}",
    "launch slurm run.toml --nodes 1 --gpus-per-node 1 run.folder={locked}/run",
    "checkpoint ls {locked}",
    "checkpoint verify {locked}",
    "checkpoint prune {locked} --keep 1",
    "jobs status {locked}",
    "jobs logs {locked}",
    "jobs cancel {locked}",
    "export {locked} --out out",
    "import {locked} --out out",
    "pool-heads {locked} --kv-heads 1 --out out",
    "upcycle run.toml --of {locked} --out out",
    "data prepare {locked} --tokenizer bytes --out out",
    "data prepare text --suffix .txt --tokenizer bytes --out {locked}/out",
    "data prepare text --suffix .txt --tokenizer {locked}/tokenizer.json --out out",
]
PROGRAM = """
import sys
from farspan.launch import cli
for command in sys.argv[1:]:
    status = cli.main(command.split())
    print(f"{status}", file=sys.stderr, flush=True)
"""


def test_a_folder_without_rights_is_named_by_every_command(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(to_toml(tiny.config(tiny.make_data(tmp_path), Path("run"), ParallelConfig())))
    locked = tmp_path / "locked"
    (locked / "train").mkdir(parents=True)
    locked.chmod(0)
    commands = [command.replace("{locked}", "locked") for command in COMMANDS]
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", PROGRAM, *commands],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    locked.chmod(0o700)
    lines = done.stderr.splitlines()
    found = dict(zip(commands, zip(lines[1::2], lines[::2], strict=False), strict=False))
    assert {command: status for command, (status, _) in found.items()} == dict.fromkeys(commands, "2"), done.stderr
    for command, (_, message) in found.items():
        assert message.startswith("farspan: "), command
        assert "locked" in message, command
        assert "ermission" in message or "cannot be" in message, (command, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EDQUOT, 2), (errno.EIO, None), (errno.ENOENT, None)],
)
def test_what_the_user_can_change_is_one_sentence(
    number: int, status: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "some/file")

    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr("farspan.trainer.data.prepare.run", fail)
    words = ["data", "prepare", "x", "--tokenizer", "bytes", "--out", "y"]
    if status is None:
        with pytest.raises(OSError, match="some/file"):
            cli.main(words)
    else:
        assert cli.main(words) == status
        assert capsys.readouterr().err.startswith(f"farspan: some/file cannot be used ({os.strerror(number)}): ")


def meet_a_full_disk(rank_with_it: int) -> list[str]:
    """On a rank: how agreement reports a full disk of one rank."""
    import torch.distributed as dist

    def work() -> None:
        if dist.get_rank() == rank_with_it:
            raise OSError(errno.ENOSPC, "No space left on device", "some/file")

    found = []
    for agree in (raise_on_all_ranks, on_first_rank):
        try:
            agree(work)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_all_ranks_learn_of_it(ranks) -> None:
    where = "some/file cannot be used (No space left on device): "
    first, second = ranks(2).run(meet_a_full_disk, 0)
    assert first == second
    assert [line.split(where)[0] for line in first] == ["ConfigError: rank 0: ", "ConfigError: "]
