from dataclasses import dataclass
from pathlib import Path

from farspan.parallel.mesh import ParallelConfig
from farspan.tools.config_reference import TARGET, meanings, reference
from farspan.trainer.config import flat
from tests.support import tiny


def test_the_file_is_up_to_date() -> None:
    assert TARGET.read_text() == reference(), "run `python -m farspan.tools.config_reference`"


def test_every_key_is_there_with_a_meaning() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    keys = [row[0].strip("| `") for row in rows]
    expected = [name.rpartition(".")[2] for name in flat(tiny.config(Path("data"), Path("run"), ParallelConfig()))]
    # A table of options has no keys of its own when it is empty.
    assert sorted(keys) == sorted([*expected, "options"])
    assert [row[0] for row in rows if len(row[4].strip(" |")) < 5] == []


def test_a_row_in_full() -> None:
    text = reference()
    assert "| `learning_rate` | a number | `0.0003` | greater than 0 | the peak |" in text
    assert "| `folder` | a path | required |  | where everything that the run writes goes |" in text
    assert "## [model.rope]\n\nRotary position embedding; the fields after" in text


@dataclass
class Example:
    """An example: of nothing. steps: updates, with a word: explained; more. low, high: of a range; top: none"""

    steps: int
    low: int
    high: int
    top: int


def test_a_docstring_is_taken_apart() -> None:
    assert meanings(Example) == (
        "An example: of nothing.",
        {"steps": "updates, with a word: explained; more", "low": "of a range", "high": "of a range", "top": "none"},
    )
