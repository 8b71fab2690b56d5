"""Commands of README and guides are parsed by the real command line, Python snippets run, links lead to files."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from farspan.launch.cli import parse
from tests.support.hugging_face_models import save_demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "log.md"
}


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


# `experts="…"` in a block is a variable of the shell.
COMMANDS = [
    shlex.join(shlex.split(line.replace("$experts", "")))
    for page in PAGES.values()
    for block in blocks("bash", page)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("farspan ")
]


def test_the_readme_has_its_three_ways_to_start() -> None:
    first, second, *_ = blocks("bash", README)
    assert "make train\n" in first
    assert "source .venv/bin/activate\n" in second, "without it farspan is not found"
    assert "farspan " not in first
    assert all(f"farspan launch {way}" in README for way in ("local", "slurm"))
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    config = getattr(parse(shlex.split(command)[1:]), "config", None)
    assert config is None or (ROOT / config).is_file()


def test_commands_of_the_guide_for_contributors_run_tests_that_exist() -> None:
    commands = blocks("bash", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(commands) == 3
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


SNIPPETS = [(page, number) for page, text in PAGES.items() for number in range(len(blocks("python", text)))]


@pytest.mark.parametrize(("page", "number"), SNIPPETS)
def test_python_in_pages_runs(page: str, number: int, tmp_path: Path) -> None:
    """What says `[1024, 8, 64]` after a line has that shape; a process group means two ranks. There is `runs/demo`.

    A snippet that needs an extra begins with the command that installs it.
    """
    snippet = blocks("python", PAGES[page])[number]
    for extra in re.findall(r"^# pip install 'farspan\[(\w+)\]'", snippet, flags=re.MULTILINE):
        if importlib.util.find_spec(extra) is None:
            pytest.skip(f"{extra} is not installed: pip install 'farspan[{extra}]'")
    if "runs/demo" in snippet:
        save_demo(tmp_path)
    shapes = re.findall(r"^(\w+) = .*# (\[[\d, ]+\])", snippet, flags=re.MULTILINE)
    checks = [f"assert list({name}.shape) == {shape}, {name}.shape" for name, shape in shapes]
    # Ranks that a snippet starts import it.
    done = "if __name__ == '__main__': print('done')"
    (tmp_path / "snippet.py").write_text("\n".join([snippet, *checks, done]))
    ranks = 2 if "init_process_group" in snippet else 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks == 2 else []
    command = [sys.executable, *torchrun, str(tmp_path / "snippet.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    # Ranks write what they print and the end of its line one after the other, so that lines may mix.
    assert "".join(run.stdout.split()).endswith("done" * ranks)


def test_the_ring_in_the_readme_is_short() -> None:
    (snippet,) = blocks("python", README)
    assert len([line for line in snippet.splitlines() if line]) <= 10


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGES[page])
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_modules_that_pages_run_exist() -> None:
    modules = {module for page in PAGES.values() for module in re.findall(r"python -m (farspan[\w.]+)", page)}
    assert modules
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []
