"""The benchmark of experts, on small ones: its loads, its files, and wrong rows have no number."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from farspan.tools import bench_experts
from farspan.tools.bench.check import Verdict
from farspan.tools.bench.run import DIRECTIONS, Result, Times
from farspan.tools.bench_experts import OURS, TORCH, ExpertBench, ExpertRow, Load, even_counts, formula, skewed_counts

SMALL = ["--rows", "100", "--width", "16", "--inner", "8", "--experts", "10", "--rounds", "3"]
RECORDED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "2026-11-28_amd_epyc_experts.json"
CPU = torch.device("cpu")


def test_loads_share_out_all_rows() -> None:
    assert even_counts(4, 10) == (3, 3, 2, 2)
    counts = skewed_counts(20, 1000)
    assert sum(counts) == 1000
    assert counts.count(0) == 2
    first, second, third = sorted(counts, reverse=True)[:3]
    assert second == pytest.approx(first / 2, rel=0.1)
    assert third == pytest.approx(first / 3, rel=0.1)
    assert list(counts) != sorted(counts, reverse=True)


def test_files_have_every_row_and_its_ratio(tmp_path: Path) -> None:
    assert bench_experts.main([*SMALL, "--out", str(tmp_path / "found")]) == 0
    records = json.loads((tmp_path / "found.json").read_text())
    assert list(records[0]) == list(json.loads(RECORDED.read_text())[0])
    names = ["dense SwiGLU", "dense SwiGLU that keeps gate and up", "grouped_swiglu"]
    assert [(r["load"], r["products"], r["direction"]) for r in records] == [
        (load, name, direction) for load in ("even", "skewed") for name in names for direction in DIRECTIONS
    ]
    assert all(r["correct"] and r["ms"] > 0 for r in records)
    assert all((r["of_dense"] == 1.0) == (r["products"] == names[0]) for r in records)
    text = (tmp_path / "found.md").read_text()
    assert "command: python -m farspan.tools.bench_experts --rows 100" in text
    assert "| skewed | grouped_swiglu |" in text
    assert json.loads((tmp_path / "found_machine.json").read_text())["threads"] == "1"


def test_the_baseline_computes_the_same() -> None:
    """On a CPU, where it is not measured."""
    load = Load(name="some", counts=(16, 0, 32, 16), width=64, inner=32, dtype=torch.bfloat16, device=CPU)
    found = ExpertRow(TORCH, load).verdict()
    assert found.correct, found.message


def test_flops_and_ratios_of_a_row() -> None:
    load = Load(name="even", counts=(2, 3), width=8, inner=4, dtype=torch.float32, device=CPU)
    dense = Times([(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)])
    row, times = ExpertRow(OURS, load), Times([(2.0, 2.0), (2.0, 6.0), (2.0, 3.0)])
    result = Result(row=row, verdict=Verdict(True, ""), size=5, times=times, baseline=[dense])
    forward, _, both = ExpertBench().records(result)
    assert forward["tflops"] == 3 * 2 * 5 * 8 * 4 / 2e9
    assert both["tflops"] == 11 * 2 * 5 * 8 * 4 / 5e9
    assert (both["of_dense"], result.speedups("fwd_bwd")) == (3 / 4, [3 / 4, 4 / 8, 5 / 5])


@pytest.mark.parametrize("fault", ["out", "gradient of an idle expert"])
def test_a_wrong_one_has_no_number(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: tuple[int, ...]) -> Tensor:
        if fault == "out":
            return formula(x, gate.roll(1, 0), up, down, counts=counts)
        return formula(x, gate, up, down, counts=counts) + down.sum() - down.sum().detach()

    monkeypatch.setattr(bench_experts, "grouped_swiglu", wrong)
    assert bench_experts.main([*SMALL, "--out", str(tmp_path / "found")]) == 0
    text = (tmp_path / "found.md").read_text()
    assert "| skewed | grouped_swiglu | not correct |" in text
    assert ("out has error" if fault == "out" else "an expert without rows has a gradient") in text
