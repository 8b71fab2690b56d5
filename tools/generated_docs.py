"""Write what is generated in the documentation; `make docs` runs it, and a test says when it is out of date.

docs/configuration.md: every key of a configuration, from the string in the source below each field of its dataclass.
README.md: the table of mechanisms and strategies, and the number of their pairs.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from farspan.kernels.mechanism import MECHANISMS
from farspan.tools import matrix
from farspan.tools.bench.report import markdown_table
from farspan.trainer.config import Config
from farspan.trainer.toml_config import BOUNDS, describe_type, toml_value

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Configuration

Every key of a configuration file. Each can be changed on the command line, as `section.key=value`. Rules between keys
are in `trainer/validate.py`. Written by `make docs`: do not edit.
"""
OPTIONS = """## [attention.options]

The options of each value of `attention.mechanism`.
"""
COLUMNS = ("key", "type", "default", "bounds", "meaning")


def generated() -> dict[Path, str]:
    """Return the text of each file that is generated, or has a part that is."""
    readme = ROOT / "README.md"
    table = matrix.table() + "\n"
    text = re.sub(r"^\| mechanism \|.*?\n(?=\n)", lambda _: table, readme.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"all \d+ pairs", f"all {table.count('✓')} pairs", text)
    return {ROOT / "docs" / "configuration.md": reference(), readme: text}


def reference() -> str:
    options = (_table(cls, f"### {name}") for name, cls in MECHANISMS.load().items())
    return "\n".join([HEAD, *_sections(Config, ""), OPTIONS, *options])


def meanings(cls: type) -> dict[str, str]:
    """Return the string literal that follows each field in the source of a class or of its bases, on one line."""
    found: dict[str, str] = {}
    # The nearest class wins.
    for owner in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(text := ast.literal_eval(following.value), str):
                found[statement.target.id] = " ".join(text.split()).rstrip(".")
    return found


def _sections(cls: type, where: str) -> Iterator[str]:
    """Yield the Markdown of a section, then of the sections inside it."""
    kinds = get_type_hints(cls)
    inside = [part for part in fields(cls) if is_dataclass(kinds[part.name])]
    if len(inside) < len(fields(cls)):
        yield _table(cls, f"## [{where}]")
    for part in inside:
        yield from _sections(kinds[part.name], f"{where}.{part.name}" if where else part.name)


def _table(cls: type, title: str) -> str:
    """Return the Markdown of a class, without the sections in it."""
    kinds, texts = get_type_hints(cls), meanings(cls)
    keys = [part for part in fields(cls) if part.init and not is_dataclass(kinds[part.name])]
    # A dataclass without a docstring gets its signature for one.
    about = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else inspect.getdoc(cls) or ""
    lines = [title, "", *([about, ""] if about else [])]
    if keys:
        rows = [_row(part, kinds[part.name], texts.get(part.name, "")) for part in keys]
        lines.append(markdown_table(COLUMNS, rows))
    return "\n".join(lines)


def _row(part: Field[Any], kind: Any, meaning: str) -> tuple[str, ...]:
    limits = [f"{words} {part.metadata[name]:,}" for name, words, _ in BOUNDS if name in part.metadata]
    return (f"`{part.name}`", describe_type(kind), _default(part), ", ".join(limits), meaning)


def _default(part: Field[Any]) -> str:
    if part.default_factory is not MISSING:
        return f"`{toml_value(part.default_factory())}`"
    return "required" if part.default is MISSING else f"`{toml_value(part.default)}`"


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
