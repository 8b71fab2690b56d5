from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.mesh import ParallelConfig
from farspan.tools import matrix
from farspan.tools.generated_docs import generated, meanings, reference
from farspan.trainer.config import flat
from tests.support import tiny


def rows() -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in reference().splitlines() if line.startswith("| `")]


def test_generated_files_are_up_to_date() -> None:
    assert [path.name for path, text in generated().items() if path.read_text() != text] == [], "run `make docs`"


def test_a_new_mechanism_comes_into_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    table = matrix.table() + "\n| toy | ✓ |"
    monkeypatch.setattr(matrix, "table", lambda: table)
    readme = next(text for path, text in generated().items() if path.name == "README.md")
    assert f"\n\n{table}\n\nEvery pair" in readme
    assert f"all {table.count('✓')} pairs" in readme


def test_every_key_is_listed() -> None:
    keys = [row[0].strip("`") for row in rows()]
    expected = [name.rpartition(".")[2] for name in flat(tiny.config(Path("data"), Path("run"), ParallelConfig()))]
    options = [part.name for name in MECHANISMS for part in fields(MECHANISMS.get(name))]  # pyright: ignore[reportArgumentType]
    # Tables have no keys of their own when they are empty.
    assert sorted(keys) == sorted([*expected, "options", "sets", *options])


def test_every_key_has_a_meaning() -> None:
    assert [row[0] for row in rows() if len(row) < 5 or len(row[4]) < 5] == []


def test_a_row_in_full() -> None:
    text = reference()
    assert "| `learning_rate` | a number | `0.0003` | greater than 0 | The peak |" in text
    assert "| `folder` | a path | required |  | Where everything that the run writes goes |" in text
    assert "## [optimizer]\n\nAdamW (arXiv 1711.05101).\n\n| key" in text
    assert "## [train]\n\n| key" in text
    assert "### moba\n" in text


@dataclass
class Base:
    """About the class."""

    low: int
    """The base's."""
    high: int
    """Also
    the base's."""


@dataclass
class Example(Base):
    low: int
    """Its own: `a`, b."""
    missing: int
    steps: int = 3
    """Updates."""


def test_strings_are_found_under_their_fields() -> None:
    assert meanings(Example) == {"low": "Its own: `a`, b", "high": "Also the base's", "steps": "Updates"}
