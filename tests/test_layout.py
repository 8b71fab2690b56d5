"""The layout's rules, each a function that is tried on the repository and on a planted violation."""

import ast
import os
from pathlib import Path

import pytest

from tests.support.sources import FOLDERS, LINKED, ROOT, dotted, imported_modules, parsed, sources

ENVIRONMENT_READER = "launch/env.py"
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb"}
# What each folder must not import: arrows point from launch and tools down to kernels, never up.
ABOVE = {
    "farspan": tuple(f"farspan.{folder}" for folder in LINKED),
    "kernels": ("farspan.parallel", "farspan.trainer", "farspan.launch", "farspan.tools", "torch.distributed"),
    "parallel": ("farspan.trainer", "farspan.launch", "farspan.tools"),
    "trainer": ("farspan.launch", "farspan.tools"),
    "launch": ("farspan.tools",),
}


def broken_links(root: Path) -> list[str]:
    """Each folder is reached through a relative link in farspan/ that leads to the real folder beside it."""
    found = []
    for name in LINKED:
        link = root / "farspan" / name
        if not link.is_symlink():
            found.append(f"farspan/{name} is not a link")
        elif os.readlink(link) != f"../{name}":
            found.append(f"farspan/{name} points to {os.readlink(link)}, not to ../{name}")
        elif not link.is_dir():
            found.append(f"farspan/{name} leads nowhere")
    return found


def package_files(root: Path) -> list[str]:
    """A folder with an __init__.py would shadow another project's package of that name."""
    return [str(path.relative_to(root)) for folder in FOLDERS for path in sorted((root / folder).rglob("__init__.py"))]


def upward_imports(path: str, source: str) -> list[str]:
    """Arrows point down only, and nothing but a test imports a test; `import farspan` and integrations are on top."""
    folder = "" if path.startswith(("farspan/__init__.py", "farspan/integrations/")) else path.partition("/")[0]
    above = ABOVE.get(folder, ()) + (() if folder == "tests" else ("farspan.tests", "tests"))
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported_modules(parsed(source))
        if any(f"{name}.".startswith(f"{upper}.") for upper in above)
    ]


def flat_imports(path: str, source: str) -> list[str]:
    """Code says `from farspan.kernels…`: under a second name a module would be loaded twice."""
    return [
        f"{path}:{line} imports {name}"
        for line, name in imported_modules(parsed(source))
        if name.startswith(".") or name.partition(".")[0] in LINKED
    ]


def environment_reads(path: str, source: str) -> list[str]:
    """Only the launcher's reader sees the environment; all else is passed. A test may prepare one for a process."""
    if path == ENVIRONMENT_READER or path.startswith("tests/"):
        return []
    found = []
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and dotted(node.value) == "os":
            names = {node.attr}
        else:
            continue
        if names & ENVIRONMENT_NAMES:
            found.append(f"{path}:{node.lineno} reads the environment")
    return found


SOURCE_RULES = [upward_imports, flat_imports, environment_reads]


@pytest.mark.parametrize("rule", [broken_links, package_files])
def test_repository_keeps_the_layout(rule):
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", SOURCE_RULES)
def test_repository_keeps_the_rule(rule):
    assert [violation for path, source in sources(ROOT) for violation in rule(path, source)] == []


def test_the_rules_see_the_repository():
    assert ("farspan/errors.py", (ROOT / "farspan/errors.py").read_text(encoding="utf-8")) in list(sources(ROOT))


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A small repository that keeps every rule, to plant a violation in."""
    (tmp_path / "farspan").mkdir()
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    for name in LINKED:
        (tmp_path / "farspan" / name).symlink_to(f"../{name}")
    assert broken_links(tmp_path) == package_files(tmp_path) == []
    return tmp_path


def test_planted_links_are_found(planted):
    links = planted / "farspan"
    for name in ("kernels", "parallel", "tools", "trainer"):
        (links / name).unlink()
    (links / "parallel").mkdir()
    (links / "tools").symlink_to(planted / "tools")
    (links / "trainer").symlink_to("../trainer")
    (planted / "trainer").rmdir()
    assert broken_links(planted) == [
        "farspan/kernels is not a link",
        "farspan/parallel is not a link",
        f"farspan/tools points to {planted}/tools, not to ../tools",
        "farspan/trainer leads nowhere",
    ]


def test_planted_package_file_is_found(planted):
    (planted / "kernels/backends").mkdir()
    (planted / "kernels/backends/__init__.py").touch()
    (planted / "tests/__init__.py").touch()
    assert package_files(planted) == ["kernels/backends/__init__.py", "tests/__init__.py"]


def test_planted_file_is_read(planted):
    (planted / "parallel/context_parallel/strategies").mkdir(parents=True)
    (planted / "parallel/context_parallel/strategies/ring.py").write_text("import kernels\n", encoding="utf-8")
    assert list(sources(planted)) == [("parallel/context_parallel/strategies/ring.py", "import kernels\n")]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/masks/rows.py", "from farspan.parallel.mesh import Mesh"),
        ("kernels/masks/rows.py", "from farspan.parallel import mesh"),
        ("kernels/masks/rows.py", "import farspan.trainer.config as config"),
        ("kernels/masks/rows.py", "from farspan import launch"),
        ("kernels/masks/rows.py", "import torch.distributed as dist"),
        ("kernels/masks/rows.py", "import torch.distributed.tensor"),
        ("kernels/masks/rows.py", "from torch import distributed"),
        ("kernels/masks/rows.py", "from torch.distributed import ReduceOp"),
        ("kernels/masks/rows.py", "import torch\ntorch.distributed.get_rank()"),
        ("kernels/backends/cpu.py", "def f():\n    from farspan.tools import bench"),
        ("kernels/masks/rows.py", "import importlib\nimportlib.import_module('farspan.trainer.train')"),
        ("kernels/masks/rows.py", "if TYPE_CHECKING:\n    from farspan.parallel.mesh import Mesh"),
        ("parallel/context_parallel/strategies/ring.py", "from farspan.trainer.config import Config"),
        ("parallel/mesh.py", "from farspan.launch.env import Ranks"),
        ("trainer/train.py", "from farspan.launch.env import Ranks"),
        ("trainer/model/moe.py", "from farspan.tools.estimate import memory"),
        ("launch/cli.py", "from farspan.tools import matrix"),
        ("launch/cli.py", "from tests.conftest import world"),
        ("tools/matrix.py", "import tests.conftest"),
    ],
)
def test_planted_upward_import_is_found(path, source):
    assert len(upward_imports(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/masks/rows.py", "import torch\nfrom farspan.errors import ConfigError"),
        ("kernels/masks/rows.py", "from torch.distributions import Normal"),
        ("parallel/comm.py", "import torch.distributed as dist\nfrom farspan.kernels.masks.rows import Rows"),
        ("launch/cli.py", "from farspan.trainer.train import train\nfrom farspan.parallel.mesh import Mesh"),
        ("tools/matrix.py", "from farspan.launch.cli import main\nfrom farspan.tools.estimate import memory"),
        ("tests/kernels/masks/test_rows.py", "from farspan.tools.matrix import table\nfrom tests.worlds import pool"),
    ],
)
def test_downward_import_is_allowed(path, source):
    assert upward_imports(path, source) == flat_imports(path, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from kernels.rows import Rows",
        "import trainer.config",
        "import tools",
        "from .rows import Rows",
        "from . import x",
    ],
)
@pytest.mark.parametrize("path", ["kernels/planning/plan.py", "tests/kernels/planning/test_plan.py"])
def test_planted_flat_import_is_found(path, source):
    assert len(flat_imports(path, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import os\nrank = os.environ['RANK']",
        "import os\nrank = os.environ.get('RANK')",
        "import os\nrank = os.getenv('RANK')",
        "from os import environ",
        "from os import getenv as read",
        "import os\nos.environ['RANK'] = '0'",
    ],
)
def test_planted_environment_read_is_found(source):
    assert len(environment_reads("trainer/train.py", source)) == 1
    assert environment_reads("launch/env.py", source) == []


def test_other_uses_of_os_are_allowed():
    source = "import os\nos.replace(a, b)\nself.environ = 1\nfrom os import path"
    assert environment_reads("trainer/train.py", source) == []
