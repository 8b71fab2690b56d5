"""The repository's Python sources, each read and parsed once."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("configs", "kernels", "launch", "parallel", "tools", "trainer")
FOLDERS = (*LINKED, "tests")


def sources(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each Python file of the mandated folders and of farspan/ itself."""
    own = sorted([*(root / "farspan").glob("*.py"), *(root / "farspan/integrations").glob("*.py")])
    for path in (*own, *(path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


@functools.cache
def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a file's text."""
    return ast.parse(source)


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield every module that code names: by import anywhere in it, by import_module, or as torch.distributed.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from farspan import launch` names a module too.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            for part in node.args[:1]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield node.lineno, part.value
        elif isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def dotted(node: ast.AST) -> str:
    """Return the name a.b.c of a chain of attributes, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""
