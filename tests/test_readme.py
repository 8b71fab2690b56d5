"""The README's commands are commands: each is parsed by the real command line."""

import re
import shlex
from pathlib import Path

import pytest

from farspan.launch.cli import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("farspan ")]


def test_the_readme_has_its_three_ways_to_start() -> None:
    assert "make train\n" in BLOCKS[0]
    assert any(command.startswith("farspan launch local") for command in COMMANDS)
    assert "source .venv/bin/activate\n" in BLOCKS[1], "without it farspan is not found"
    assert "farspan " not in BLOCKS[0]
    assert any(command.startswith("farspan launch slurm") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    options = parse(shlex.split(command)[1:])
    for config in [getattr(options, "config", None)]:
        assert config is None or (ROOT / config).is_file()


def test_commands_of_the_guide_for_contributors_run_tests_that_exist() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    commands = re.findall(r"```bash\n(.*?)```", guide, flags=re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        assert all((ROOT / word).exists() for word in command.split() if word.startswith("tests/"))


def test_the_tree_names_files_that_exist() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names = re.match(r"\s*((?:[\w.]+/?\s)+)", line)
        assert names, line
        if not line.startswith(" "):
            folder = names.group(1).strip()
            assert (ROOT / folder).is_dir(), folder
            continue
        for name in names.group(1).split():
            if "." in name or name.endswith("/"):
                assert (ROOT / folder / name).exists(), f"{folder}{name}"
