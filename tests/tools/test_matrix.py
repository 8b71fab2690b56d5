"""The table of mechanisms and strategies: from the registries, and in the README."""

from pathlib import Path

import pytest

from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.tools.matrix import main, supported, table
from farspan.units import BYTES, FLOPS, SECONDS, readable

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
    overrides = ["parallel.context=4", "parallel.context_inner=2", "parallel.outer_gbytes_per_s=12.5"]
    path = str(ROOT / "configs" / "llama3_8b_128k.toml")
    assert main(["--costs", path, *overrides, "data.sequence_tokens=8192"]) == 0
    head, _, rest = capsys.readouterr().out.partition("\n\n")
    of_what = ["8,192 tokens", "32 layers", "Dense(causal=True)", "bfloat16", "over 4 ranks", "zigzag"]
    on_what = ["GPU", "400 TFLOP/s", "200 GB/s among 2 ranks", "12.5 GB/s between nodes"]
    assert [part for part in of_what + on_what if part not in head] == []
    columns, _, *lines = [line.strip("| ").split(" | ") for line in rest.splitlines() if line.startswith("|")]
    refused = {line[2:].split(":")[0] for line in rest.splitlines() if line.startswith("- ")}
    assert {line[0] for line in lines} | refused == set(STRATEGIES)
    assert {"single", "state", "ship"} <= refused
    rows = {line[0]: dict(zip(columns, line, strict=True)) for line in lines}
    times = [number_of(row["time"], SECONDS) for row in rows.values()]
    assert times == sorted(times)
    # Keys and values of 8 heads of 128 bfloat16 numbers, of 2,048 tokens, to three ranks, in 32 layers.
    gathered = 2 * 8 * 128 * 2 * 2048 * 3 * 32
    assert number_of(rows["gather"]["sent forward"], BYTES) == pytest.approx(gathered, rel=5e-3)
    # 32 heads, 4 FLOPs for each of 128 features and pair; zigzag shares pairs evenly but for half a key per query.
    flops = 32 * 32 * 4 * 128 * 8192 * 8193 / 2 / 4
    assert number_of(rows["gather"]["FLOPs forward"], FLOPS) == pytest.approx(flops, rel=5e-3)
    assert number_of(rows["gather"]["compute"], SECONDS) == pytest.approx(3.5 * flops / 4e14, rel=5e-3)
    # The four ranks are in two nodes: a ring moves chunks while it computes, gather moves all before that and after.
    for name, transfers, others in (("ring", "overlapped", "exposed"), ("gather", "exposed", "overlapped")):
        sent = sum(number_of(rows[name][f"sent {direction}"], BYTES) for direction in ("forward", "backward"))
        assert number_of(rows[name][f"transfers {transfers}"], SECONDS) == pytest.approx(sent / 12.5e9, rel=1e-2)
        assert rows[name][f"transfers {others}"] == "0"


def number_of(text: str, units: list[tuple[float, str]]) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {name: scale for scale, name in units}[unit]


@pytest.mark.parametrize(
    ("value", "units", "text"),
    [
        (0, BYTES, "0"), (7, BYTES, "7 B"), (1023, BYTES, "1,023 B"), (1024, BYTES, "1 KiB"),
        (1.5 * 2**30, BYTES, "1.5 GiB"),
        (2.5e-7, SECONDS, "0.25 µs"), (0.0123456, SECONDS, "12.3 ms"), (12345.6, SECONDS, "12,346 s"),
        (4e14, FLOPS, "400 TFLOP"),
    ],
)  # fmt: skip
def test_readable_quantities(value: float, units: list[tuple[float, str]], text: str) -> None:
    assert readable(value, units) == text


def test_what_cannot_be_is_said_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--costs", "nowhere.toml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.toml does not exist")
