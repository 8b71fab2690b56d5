"""The table of mechanisms and strategies: from the registries, and in the README."""

import json
from pathlib import Path

import pytest

from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.tools.matrix import main, pairs, table

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_has_the_table_as_it_is() -> None:
    assert table(pairs()) in (ROOT / "README.md").read_text(), "put what `python -m farspan.tools.matrix` prints there"


def test_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == len(list(MECHANISMS)) * len(list(STRATEGIES))
    for record in records:
        assert list(record) == ["mechanism", "strategy", "supported", "reason"]
        assert record["supported"] == (record["reason"] == "")
    reasons = {(record["mechanism"], record["strategy"]): record["reason"] for record in records}
    assert "set parallel.strategy='state' or 'ulysses'" in reasons["lightning", "ring"]
    assert reasons["moba", "ship"] == reasons["dense", "single"] == ""


def test_a_mechanism_that_was_added_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS._parts, "toy", Dense)
    (line,) = [line for line in table(pairs()).splitlines() if line.startswith("| toy |")]
    assert line.count("✓") == sum(pair.supported for pair in pairs() if pair.mechanism == "dense")


def test_costs_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "llama3_8b_128k.toml")
    assert main(["--costs", config, "parallel.context=4", "parallel.context_inner=2", "data.sequence_tokens=8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {line.split("|")[1].strip() for line in lines[2:] if line.startswith("|")}
    refused = {line[2:].split(":")[0] for line in lines if line.startswith("- ")}
    assert named | refused == set(STRATEGIES)
    assert {"single", "state", "ship"} <= refused
    assert main(["--costs", config, "--json", "parallel.context=2", "data.sequence_tokens=8192"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert records[0]["seconds"] == min(record["seconds"] for record in records)
    assert records[0]["volume"]["forward"] > 0


def test_what_cannot_be_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--costs", "nowhere.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.toml does not exist")
