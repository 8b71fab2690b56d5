"""`~` and `$NAME` in paths, wherever a user writes one: in files, overrides and arguments of every command."""

import argparse
import re
from pathlib import Path

import pytest

from farspan.errors import ConfigError
from farspan.launch import cli, env
from farspan.launch.slurm.site import load_site
from farspan.paths import expanded
from farspan.tools.command import parser_of
from farspan.trainer.config import Config
from farspan.trainer.toml_config import load_config
from tests.support import tiny

COMMANDS = {
    "train @": "config",
    "launch local --gpus-per-node 2 @": "config",
    "launch slurm --nodes 1 --gpus-per-node 2 --site @ c.toml": "site",
    "launch slurm --nodes 1 --gpus-per-node 2 --container @ c.toml": "container",
    "jobs status @": "run",
    "jobs logs @": "run",
    "data prepare @ --tokenizer bytes --out out": "paths",
    "data prepare in --tokenizer @ --out out": "tokenizer",
    "data prepare in --tokenizer bytes --out @": "out",
    "upcycle c.toml --of @ --out out": "of",
    "pool-heads @ --kv-heads 1 --out out": "source",
    "import @ --out out": "source",
    "export in --out @": "out",
    "checkpoint ls @": "run",
    "checkpoint verify @": "folder",
    "checkpoint prune --keep 1 @": "run",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs", "/home/me/runs"),
        ("~", "/home/me"),
        ("~root/runs", "/root/runs"),
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("${SCRATCH}2/$SCRATCH", "/scratch/me2//scratch/me"),
        ("runs/~old", "runs/~old"),
        ("./~", "./~"),
        ("cost$5/a$", "cost$5/a$"),
        ("--mounts=$SCRATCH:/data", "--mounts=/scratch/me:/data"),
    ],
)
def test_what_a_shell_expands(text: str, path: str) -> None:
    assert expanded(text) == path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("$UNSET/runs", "$UNSET"),
        ("${UNSET}", "${UNSET}"),
        ("$EMPTY/runs", "$EMPTY"),
        ("~nobody.here/x", "~nobody.here"),
    ],
)
def test_what_is_not_there_is_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"^has {re.escape(named)}, which "):
        expanded(text)


@pytest.mark.parametrize(("command", "name"), COMMANDS.items())
def test_every_command(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def value(path: str) -> str:
        found = getattr(cli.parse([path if word == "@" else word for word in command.split()]), name)
        return str(found[0] if isinstance(found, list) else found)

    assert [value("~/a"), value("$SCRATCH/a"), value("a")] == ["/home/me/a", "/scratch/me/a", "a"]
    for path, problem in (("$UNSET/a", "'$UNSET/a' has $UNSET, which is not set here"), ("", "'' is empty: ")):
        with pytest.raises(SystemExit) as refused:
            value(path)
        assert refused.value.code == 2
        assert problem in capsys.readouterr().err


def test_tools() -> None:
    parser = parser_of("")
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out", "~/a"]) == argparse.Namespace(out=Path("/home/me/a"))


def test_the_configuration_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    model = "layers = 1\nwidth = 8\nheads = 1\nkv_heads = 1\nhead_dim = 8\nfeed_forward = 8\nvocabulary_size = 264\n"
    file.write_text(
        f'[run]\nfolder = "~/runs"\n[data]\nfolder = "$SCRATCH/data"\nsequence_tokens = {tiny.SEQUENCE_TOKENS}\n'
        f"[model]\n{model}[train]\nsteps = 1\n"
    )
    config = load_config(Config, file, ["run.start_from=${SCRATCH}/w", 'run.replay="~/batch"'])
    assert [config.run.folder, config.run.start_from, config.run.replay, config.data.folder] == [
        Path("/home/me/runs"), Path("/scratch/me/w"), Path("/home/me/batch"), Path("/scratch/me/data"),
    ]  # fmt: skip
    for key in ("run.folder", "run.start_from", "run.replay", "data.folder"):
        with pytest.raises(ConfigError) as refused:
            load_config(Config, file, [f"{key}=$UNSET/a"])
        assert str(refused.value).startswith(f"{key}='$UNSET/a' has $UNSET, ")


def test_the_settings_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "site.toml"
    text = 'setup = ["cd $UNSET"]\n[sbatch]\naccount = "$SCRATCH"\nexclusive = true\n[environment]\nHF_HOME = "~/hf"\n'
    file.write_text(f'{text}[container]\nsrun = ["--mounts=$SCRATCH:/data"]\npython = "~/bin/python"\n')
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("FARSPAN_SITE", "$SCRATCH/site.toml")
    site = load_site(env.site_file())
    assert (site.sbatch, site.environment) == (
        {"account": str(tmp_path), "exclusive": True},
        {"HF_HOME": "/home/me/hf"},
    )
    assert (site.container.srun, site.container.python) == ((f"--mounts={tmp_path}:/data",), "/home/me/bin/python")
    assert site.setup == ("cd $UNSET",)
    file.write_text('[environment]\nTMPDIR = "$UNSET"\n')
    with pytest.raises(ConfigError, match=r"environment.TMPDIR in .*='\$UNSET' has \$UNSET, "):
        load_site(file)
    monkeypatch.setenv("FARSPAN_SITE", "$UNSET/site.toml")
    with pytest.raises(ConfigError, match=r"FARSPAN_SITE='\$UNSET/site.toml' has \$UNSET, "):
        env.site_file()
