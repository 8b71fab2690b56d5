"""The wheel, in an environment without the checkout: its files, the command line, training, snippets of docs/api.md.

Everything that farspan depends on comes from the environment of the tests, so that nothing is downloaded.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.hugging_face_models import save_demo
from tests.support.sources import LINKED, ROOT
from tests.test_readme import blocks

# Not by its spec: setuptools replaces distutils where one looks for pip's, and warns where others have imported it.
if not list(importlib.metadata.distributions(name="pip")):
    pytest.skip("pip is not installed", allow_module_level=True)
for needed in ("ensurepip", "setuptools", "venv"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)
SNIPPETS = """
import pathlib, sys
import farspan, farspan.kernels.attention
for module in (farspan, farspan.kernels.attention):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module
for number, snippet in enumerate(sys.argv[1:]):
    exec(compile(snippet, f"snippet {number}", "exec"), {"__name__": "snippet"})
print("done")
"""


def run(folder: Path, *command: str) -> str:
    """Run a program of the environment in a folder of its own, without the variables of this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = folder / "venv" / "bin" / command[0]
    done = subprocess.run(
        [str(program), *command[1:]],
        cwd=folder / "elsewhere",
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as setuptools leaves its work behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("farspan", *LINKED):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", str(folder), str(folder / "source"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `venv`, which has the wheel, and `elsewhere`, where programs run."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "elsewhere").mkdir()
    save_demo(folder / "elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = str(folder / "venv" / "bin" / "python")
    pip("--python", python, "install", "-q", "--no-index", "--no-deps", str(wheel))
    # A folder that a .pth file adds is searched last, and its own .pth files, the editable farspan's, are not read.
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_it_has_every_file_where_it_is_imported_from(wheel: Path) -> None:
    wanted = {
        str((Path(folder) / name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "farspan", followlinks=True)
        for name in names
        if name.endswith((".py", ".sh", ".toml", "py.typed"))
    }
    assert {"farspan/py.typed", "farspan/launch/slurm/job.sh", "farspan/configs/demo.toml"} <= wanted
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_the_command_line_runs_and_trains(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "farspan", "--version").startswith("farspan 0.1.0\n"), "no commit"
    (demo,) = (installed / "venv").rglob("farspan/configs/demo.toml")
    data = tiny.make_data(tmp_path)
    settings = [f"data.folder={data}", f"run.folder={tmp_path / 'run'}", "parallel.context=1", "train.steps=1"]
    settings += ["optimizer.warmup_steps=0", "data.sequence_tokens=64", "model.width=32", "evaluate.sequences=1"]
    run(installed, "farspan", "train", str(demo), *settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1]


def test_a_job_finds_its_script(installed: Path) -> None:
    (demo,) = (installed / "venv").rglob("farspan/configs/demo.toml")
    script = run(installed, "farspan", "launch", "slurm", str(demo), "--nodes=1", "--gpus-per-node=2", "--dry-run")
    assert script.startswith("#!/bin/bash\n#SBATCH")
    assert str(installed / "venv") in script


def test_snippets_of_one_device_run(installed: Path) -> None:
    snippets = [text for text in blocks("python", (ROOT / "docs/api.md").read_text()) if "init_process" not in text]
    assert len(snippets) >= 2
    assert run(installed, "python", "-c", SNIPPETS, *snippets).endswith("done\n")
