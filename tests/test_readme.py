"""Commands of README and guides are parsed by the real command line, Python snippets run, links lead to files."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from farspan.launch.cli import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"
}
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
# `experts="…"` in a block is a variable of the shell.
COMMANDS = [
    shlex.join(shlex.split(line.replace("$experts", "")))
    for page in PAGES.values()
    for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("farspan ")
]


def test_the_readme_has_its_three_ways_to_start() -> None:
    assert "make train\n" in BLOCKS[0]
    assert "source .venv/bin/activate\n" in BLOCKS[1], "without it farspan is not found"
    assert "farspan " not in BLOCKS[0]
    assert all(f"farspan launch {way}" in README for way in ("local", "slurm"))
    assert len(README.splitlines()) <= 200


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
    tree = README.split("## Code")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names = re.match(r"\s*((?:[\w.]+/?\s)+)", f"{line} ")
        assert names, line
        if not line.startswith(" "):
            folder = names.group(1).strip()
            assert (ROOT / folder).is_dir(), folder
            continue
        for name in names.group(1).split():
            if "." in name or name.endswith("/"):
                assert (ROOT / folder / name).exists(), f"{folder}{name}"


def test_python_in_the_readme_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["out"].shape == (1024, 8, 64)
    assert names["lse"].shape == (1024, 8)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGES[page])
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_modules_that_pages_run_exist() -> None:
    modules = {module for page in PAGES.values() for module in re.findall(r"python -m (farspan[\w.]+)", page)}
    assert modules
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []
