"""The table of mechanisms and strategies: from the registries, and in the README."""

from pathlib import Path

import pytest

from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.tools.matrix import main, supported, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("mechanism", "strategy", "runs"), [("lightning", "ring", False), ("moba", "ship", True), ("dense", "single", True)]
)
def test_what_runs_together(mechanism: str, strategy: str, runs: bool) -> None:
    assert supported(MECHANISMS.get(mechanism).examples()[0], STRATEGIES.get(strategy)) == runs


def test_a_mechanism_that_was_added_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS._parts, "toy", Dense)
    lines = table().splitlines()
    assert len(lines) == 2 + len(list(MECHANISMS))
    (toy,), (dense,) = ([line for line in lines if line.startswith(f"| {name} |")] for name in ("toy", "dense"))
    assert toy.replace("toy", "dense") == dense


def test_costs_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "llama3_8b_128k.toml")
    assert main(["--costs", config, "parallel.context=4", "parallel.context_inner=2", "data.sequence_tokens=8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")}
    refused = {line[2:].split(":")[0] for line in lines if line.startswith("- ")}
    assert named | refused == set(STRATEGIES)
    assert {"single", "state", "ship"} <= refused
    milliseconds = [float(line.split("|")[2].replace(",", "")) for line in lines[2:] if line.startswith("|")]
    assert milliseconds == sorted(milliseconds)
    assert float(lines[2].split("|")[6].replace(",", "")) > 0, "MiB sent forward"


def test_what_cannot_be_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--costs", "nowhere.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.toml does not exist")
