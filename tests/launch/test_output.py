"""Standard output that is closed, full or without a reader: a command does its work and says nothing of pipes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.toml_config import to_toml
from tests.support import tiny

COMMANDS = [
    "--help",
    "train run.toml",
    "launch slurm run.toml --nodes 1 --gpus-per-node 2 --dry-run",
    "checkpoint ls run",
    "train run.toml --dry-run",
    "launch local run.toml --gpus-per-node 2 --dry-run",
    "data prepare text --suffix .txt --tokenizer bytes --validation-fraction 0.2 --out more",
    "checkpoint verify run",
    "export run --out exported",
]
# Each command is a process that has imported everything already. Only standard error is written.
PROGRAM = """
import os, sys, signal
import torch, torch.distributed.checkpoint
import farspan.trainer.train, farspan.trainer.data.prepare
from farspan.launch import cli
for command in sys.argv[2:]:
    if not os.fork():
        if sys.argv[1] == "closed":
            os.close(1)
            sys.stdout = None
        sys.argv = ["farspan", *command.split()]
        try:
            cli.run_and_exit()
        finally:
            os._exit(sys.exc_info()[1].code)
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
"""


ODD = r"""
from farspan.launch.output import guard_standard_streams, print_error
guard_standard_streams()
print("run/caf\xe9 \u6f22 \udcff")
print_error("run/caf\xe9 \u6f22 \udcff")
"""


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("ascii", b"run/caf\\xe9 \\u6f22 \\udcff"),
        ("latin-1", b"run/caf\xe9 \\u6f22 \\udcff"),
        ("utf-8", "run/café 漢 ".encode() + b"\\udcff"),
    ],
    ids=["ascii", "latin-1", "utf-8"],
)
def test_names_that_the_encoding_lacks_are_escaped(encoding: str, name: bytes) -> None:
    """Bytes of a path that are no text, too."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", ODD], env=environment, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, name + b"\n", b"farspan: " + name + b"\n")


def without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny.config(tiny.make_data(tmp_path), Path("run"), ParallelConfig(), steps=3)
    (tmp_path / "run.toml").write_text(to_toml(config))
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "output", "commands"),
    [
        ("no reader", without_reader, COMMANDS),
        ("closed", lambda: os.open(os.devnull, os.O_WRONLY), COMMANDS[:4]),
        ("full", lambda: os.open("/dev/full", os.O_WRONLY), COMMANDS[:4]),
    ],
)
def test_a_command_goes_on(folder: Path, kind: str, output: Callable[[], int], commands: list[str]) -> None:
    stdout = output()
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    program = [sys.executable, "-c", PROGRAM, kind, *commands]
    done = subprocess.run(program, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    *texts, rest = re.split(r"^status (-?\d+)\n", done.stderr, flags=re.MULTILINE)
    assert rest == ""
    for command, status, said in zip(commands, texts[1::2], texts[::2], strict=True):
        # What a rank prints is for those who read along; what other commands print is what they are for.
        assert status == ("2" if kind == "full" and command != "train run.toml" else "0"), (command, said)
        lines = [line for line in said.splitlines() if "slurm" not in command or line.startswith("farspan: ")]
        assert len(lines) == (kind == "full"), (command, said)
        assert all(line.startswith("farspan: standard output cannot be written (No space left") for line in lines)
    for name in ("run/checkpoints/step_00000003", "more/train/tokens.bin", "exported/config.json"):
        assert (folder / name).exists() or commands != COMMANDS, name
