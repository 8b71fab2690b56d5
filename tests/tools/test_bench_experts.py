"""The benchmark of experts, on small ones: its loads, its files, and what is wrong has no number."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farspan.tools import bench_experts
from farspan.tools.bench import experts
from farspan.tools.bench.experts import Load, even_counts, skewed_counts
from farspan.tools.bench.timing import DIRECTIONS, Times

SMALL = ["--rows", "100", "--width", "16", "--inner", "8", "--experts", "10", "--rounds", "3"]


def test_loads_share_out_all_rows() -> None:
    assert even_counts(4, 10) == (3, 3, 2, 2)
    counts = skewed_counts(20, 1000)
    assert sum(counts) == 1000
    assert counts.count(0) == 2
    first, second, third = sorted(counts, reverse=True)[:3]
    assert second == pytest.approx(first / 2, rel=0.1)
    assert third == pytest.approx(first / 3, rel=0.1)
    assert list(counts) != sorted(counts, reverse=True)


def test_files_have_every_row_and_its_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_experts.main([*SMALL, "--out", str(tmp_path / "found")]) == 0
    records = json.loads((tmp_path / "found.json").read_text())
    names = ["dense linear", "dense SwiGLU", "dense SwiGLU that keeps gate and up", "grouped_swiglu"]
    assert [(r["load"], r["products"], r["direction"]) for r in records] == [
        (load, name, direction) for load in ("even", "skewed") for name in names for direction in DIRECTIONS
    ]
    assert all(r["correct"] and r["ms"] > 0 for r in records)
    dense = [r["of_dense"] for r in records if r["products"] in names[:2]]
    assert dense == [1.0] * len(dense)
    text = (tmp_path / "found.md").read_text()
    assert "command: python -m farspan.tools.bench_experts --rows 100" in text
    assert "| skewed | grouped_swiglu |" in text
    assert json.loads((tmp_path / "found_machine.json").read_text())["threads"] == "1"


@pytest.mark.parametrize("rival", experts.RIVALS, ids=lambda rival: rival.name)
def test_rivals_compute_the_same(rival: experts.Contender) -> None:
    """On a CPU, where they are not measured."""
    counts, device = (16, 0, 32, 16), torch.device("cpu")
    load = Load(name="some", counts=counts, width=64, inner=32, dtype=torch.bfloat16, device=device)
    found = experts.verdict(rival, load)
    assert found.correct, found.said


def test_flops_and_ratios_of_a_row() -> None:
    load = Load(name="even", counts=(2, 3), width=8, inner=4, dtype=torch.float32, device=torch.device("cpu"))
    verdict = experts.Verdict(True, "")
    dense, ours = experts.DENSE[1], experts.OURS[0]
    rows = [
        bench_experts.Row(dense, load, verdict, Times([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])),
        bench_experts.Row(ours, load, verdict, Times([2.0, 2.0, 2.0], [2.0, 6.0, 3.0])),
    ]
    forward, _, both = list(bench_experts.records_of(rows))[3:]
    assert forward.tflops == 3 * 2 * 5 * 8 * 4 / 2e9
    assert both.tflops == 11 * 2 * 5 * 8 * 4 / 5e9
    assert both.of_dense == 3 / 4  # of 3/4, 4/8 and 5/5
    assert next(iter(list(bench_experts.table(rows))[1:])).endswith("| 0.75 | 0.5 | 1 |")


def test_a_wrong_one_has_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: tuple[int, ...]) -> Tensor:
        return experts.formula(experts.SWIGLU, counts)(x, gate.roll(1, 0), up, down)

    monkeypatch.setattr(experts, "grouped_swiglu", wrong)
    assert bench_experts.main([*SMALL, "--out", str(tmp_path / "found")]) == 0
    text = (tmp_path / "found.md").read_text()
    assert "| skewed | grouped_swiglu | not correct |" in text
    assert "result 0 has error" in text


@pytest.mark.parametrize(("option", "least"), [("--rounds", 3), ("--experts", 1)])
def test_numbers_too_small_are_refused(option: str, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_experts.main([option, str(least - 1)])
    assert f"{option} {least - 1} must be at least {least}" in capsys.readouterr().err
