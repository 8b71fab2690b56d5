"""Write docs/configuration.md: every key of a configuration, from the dataclasses that read it.

Run again when a test says that the file is out of date: `python -m farspan.tools.config_reference`.
"""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from farspan.trainer.config import Config
from farspan.trainer.toml_config import BOUNDS, describe_type, toml_value

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every key of a configuration file. Each can be changed on the command line, as `section.key=value`. Rules between keys
are in `trainer/validate.py`. Written by `python -m farspan.tools.config_reference`: do not edit.
"""
COLUMNS = ("key", "type", "default", "bounds", "meaning")


def reference() -> str:
    """Return the text of the file."""
    return "\n".join([HEAD, *_sections(Config, "")])


def meanings(cls: type) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of the class, and what it says of each field, as in `steps: updates in all.`"""
    name = f"(?:{'|'.join(part.name for part in fields(cls))})"
    text = " ".join((cls.__doc__ or "").split())
    about, *pairs = re.split(rf"(?:^|(?<=[.;] ))({name}(?:, {name})*): ", text)
    said = {
        key: said.strip(" .;") for keys, said in zip(pairs[::2], pairs[1::2], strict=True) for key in keys.split(", ")
    }
    return about.strip(), said


def _sections(cls: type, where: str) -> Iterator[str]:
    """Yield the Markdown of a section, then of those inside it."""
    kinds, (about, said) = get_type_hints(cls), meanings(cls)
    inside = [part for part in fields(cls) if is_dataclass(kinds[part.name])]
    keys = [part for part in fields(cls) if part not in inside]
    if keys:
        rows = [COLUMNS, ("---",) * len(COLUMNS)]
        rows += [_row(part, kinds[part.name], said[part.name]) for part in keys]
        title = [f"## [{where}]", "", *([about, ""] if about else [])]
        yield "\n".join([*title, *(f"| {' | '.join(row)} |" for row in rows), ""])
    for part in inside:
        yield from _sections(kinds[part.name], f"{where}.{part.name}" if where else part.name)


def _row(part: Field[Any], kind: Any, meaning: str) -> tuple[str, ...]:
    limits = [f"{words} {part.metadata[name]:,}" for name, words, _ in BOUNDS if name in part.metadata]
    return (f"`{part.name}`", describe_type(kind), _default(part), ", ".join(limits), meaning)


def _default(part: Field[Any]) -> str:
    if part.default_factory is not MISSING:
        return f"`{toml_value(part.default_factory())}`"
    return "required" if part.default is MISSING else f"`{toml_value(part.default)}`"


if __name__ == "__main__":
    TARGET.write_text(reference())
