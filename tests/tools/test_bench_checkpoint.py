"""The benchmark of checkpoints, on a small model: its files, and ratios that follow from their seconds."""

import json
from pathlib import Path

import pytest

from farspan.tools import bench_checkpoint
from farspan.tools.bench_checkpoint import ratios

RECORDED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "2026-11-28_amd_epyc_checkpoint.json"


@pytest.mark.filterwarnings("ignore")
def test_files_have_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "1", "--width", "64", "--rounds", "2", "--scratch", str(tmp_path)]
    assert bench_checkpoint.main([*small, "--out", str(tmp_path / "found")]) == 0
    rounds = json.loads((tmp_path / "found.json").read_text())
    assert [list(one) for one in rounds] == [list(json.loads(RECORDED.read_text())[0])] * 2
    assert all(0 < one["begun"] < one["background"] and one["reading_stored"] > 0 for one in rounds)
    text = (tmp_path / "found.md").read_text()
    assert "command: python -m farspan.tools.bench_checkpoint --layers 1" in text
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line for line in text.splitlines() if line.startswith("| ")] == shown
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_ratios() -> None:
    seconds = {"alone": 10.0, "waiting": 14.0, "background": 10.4, "begun": 0.1}
    seconds |= {"reading_stored": 2.0, "loading_stored": 2.5, "reading_cached": 1.0, "loading_cached": 1.5}
    expected = {"of_all_saving": 0.1, "verified_stored": 0.25, "verified_cached": 0.5}
    assert ratios(seconds) == pytest.approx(expected)
