"""House rules that a program can check: packages, sizes, comments and words. Rules of imports are in test_layout.py."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.sources import ROOT, imported_modules, parsed, sources

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MAX_LOOSE_FILES = {"kernels": 12, "parallel": 8, "trainer": 16, "launch": 8}
MIN_COMMENT_SHARE = {"kernels": 0.04, "parallel": 0.04}
# Hyphenated, so that this file does not contain them. The glossary in CONTRIBUTING.md has the words to use instead.
PRIVATE_WORDS = "de-alt re-deal every-one hold-ing home-ward jour-ney age-ing me-nd".replace("-", "").split()
PROSE = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
HISTORY = {"docs/log.md"}


def long_functions(path: str, source: str) -> list[str]:
    """A function that outgrew the budget does more than one thing; a Triton kernel is one flat loop."""
    if path.startswith("kernels/triton_kernels/"):
        return []
    spans = [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.FunctionDef)
    ]
    return [f"{path}: {name} has {lines} lines" for name, lines in spans if lines > MAX_FUNCTION_LINES]


def private_words(path: str, text: str) -> list[str]:
    """Words of this project's youth for which the field has others."""
    pattern = re.compile(rf"\b({'|'.join(PRIVATE_WORDS)})\b", re.IGNORECASE)
    lines = enumerate(text.splitlines(), start=1)
    return [f"{path}:{number} says {word}" for number, line in lines for word in pattern.findall(line)]


def comment_share(texts: list[str]) -> float:
    """Return the share of lines that have a comment."""
    lines = [line for text in texts for line in text.splitlines()]
    # A hash inside a string is rare enough not to matter for a share.
    return sum(bool(re.search(r"(^|\s)# ", line)) for line in lines) / len(lines)


def package(folder: str, path: str) -> str:
    """Return the package of a file: the folder inside `folder` that it lies in, or the file itself."""
    return Path(path).relative_to(folder).parts[0].removesuffix(".py")


def package_imports(folder: str, files: dict[str, str]) -> dict[str, set[str]]:
    """Return the packages that each package of a folder imports."""
    arrows: dict[str, set[str]] = {package(folder, path): set() for path in files}
    for path, source in files.items():
        for _, name in imported_modules(parsed(source)):
            parts = name.split(".")
            if parts[:2] == ["farspan", folder] and parts[2] in arrows and parts[2] != package(folder, path):
                arrows[package(folder, path)].add(parts[2])
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return packages that import each other in a circle, if there are any."""
    rest = dict(arrows)
    while rest:
        imported = set().union(*rest.values())
        # A package that imports none of the rest, or that none of them imports, is in no circle.
        free = [name for name, targets in rest.items() if name not in imported or not targets & rest.keys()]
        if not free:
            break
        rest = {name: targets - set(free) for name, targets in rest.items() if name not in free}
    return sorted(rest)


def of_folder(folder: str) -> dict[str, str]:
    return {path: source for path, source in sources() if path.startswith(f"{folder}/")}


@pytest.mark.parametrize("rule", [long_functions, private_words])
def test_sources_keep_the_rule(rule):
    assert [violation for path, source in sources() for violation in rule(path, source)] == []


def test_files_fit_the_budget():
    lengths = {path: len(source.splitlines()) for path, source in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


@pytest.mark.parametrize("path", sorted(set(PROSE) - HISTORY))
def test_prose_has_no_private_words(path):
    assert private_words(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(("folder", "most"), MAX_LOOSE_FILES.items())
def test_files_lie_in_packages(folder, most):
    assert len(list((ROOT / folder).glob("*.py"))) <= most


@pytest.mark.parametrize("folder", MAX_LOOSE_FILES)
def test_packages_import_no_circle(folder):
    assert circle(package_imports(folder, of_folder(folder))) == []


@pytest.mark.parametrize(("folder", "least"), MIN_COMMENT_SHARE.items())
def test_hard_code_has_comments(folder, least):
    assert comment_share(list(of_folder(folder).values())) >= least


def test_planted_violations_are_found():
    long = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions("kernels/plan.py", long) == [f"kernels/plan.py: f has {MAX_FUNCTION_LINES + 1} lines"]
    assert long_functions("kernels/plan.py", long.removesuffix("    x = 1\n")) == []
    word = PRIVATE_WORDS[0].title()
    assert private_words("README.md", f"a\n{word}") == [f"README.md:2 says {word}"]
    assert comment_share(["x = 1  # why\n# why\ny = 2\nz = '#'\n"]) == 0.5


def test_a_planted_circle_is_found():
    files = {
        "kernels/plan.py": "from farspan.kernels.masks.rows import Rows",
        "kernels/masks/rows.py": "def f():\n    import farspan.kernels.merge",
        "kernels/masks/mask.py": "from farspan.kernels.masks.rows import Rows",
        "kernels/merge.py": "from farspan.kernels.masks import mask",
    }
    assert circle(package_imports("kernels", files)) == ["masks", "merge"]
    del files["kernels/merge.py"]
    assert circle(package_imports("kernels", files)) == []
