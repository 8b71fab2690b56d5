"""The benchmark of checkpoints, on a small model: its files, and ratios that follow from their seconds."""

import json
from pathlib import Path

import pytest

from farspan.tools import bench_checkpoint
from farspan.tools.bench_checkpoint import Round


@pytest.mark.filterwarnings("ignore")
def test_files_have_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "1", "--width", "64", "--rounds", "2", "--scratch", str(tmp_path)]
    assert bench_checkpoint.main([*small, "--out", str(tmp_path / "found")]) == 0
    rounds = [Round(**values) for values in json.loads((tmp_path / "found.json").read_text())]
    assert len(rounds) == 2
    assert all(0 < one.begun < one.background and one.reading_stored > 0 for one in rounds)
    text = (tmp_path / "found.md").read_text()
    assert "command: python -m farspan.tools.bench_checkpoint --layers 1" in text
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line for line in text.splitlines() if line.startswith("| ")] == shown
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_ratios() -> None:
    one = Round(
        alone=10.0, waiting=14.0, background=10.4, begun=0.1,
        reading_stored=2.0, loading_stored=2.5, reading_cached=1.0, loading_cached=1.5,
    )  # fmt: skip
    assert one.of_all_saving == pytest.approx(0.1)
    assert one.verified_stored == pytest.approx(0.25)
    assert one.verified_cached == pytest.approx(0.5)


def test_a_device_that_is_not_there_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench_checkpoint.main(["--device", "cuda"]) == 2
    assert "error: " in capsys.readouterr().err
