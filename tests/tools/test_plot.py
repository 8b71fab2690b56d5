"""Plots: lines, names and scales in the SVG, and none without matplotlib."""

from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import pytest

from farspan.tools.bench import report
from farspan.tools.bench.report import Plot, draw

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("log", ["", "x", "xy"])
@pytest.mark.parametrize("points", [[], [(512, 1.5)], [(512, 2.0), (1024, 3.0), (2048, 6.0)]], ids=len)
def test_every_line_is_named(points: list[tuple[float, float]], log: Literal["", "x", "xy"], tmp_path: Path) -> None:
    drawn = Plot(title="x < y", series={"a & b": points, "no points": []}, x="step", y="loss", log=log)
    assert draw({"new.svg": drawn}, tmp_path) == [tmp_path / "new.svg"]
    texts = {element.text for element in ElementTree.parse(tmp_path / "new.svg").iter() if element.text}
    assert {"x < y", "step", "loss"} <= texts
    assert ("a & b" in texts) == bool(points)
    assert "no points" not in texts
    assert not (log and points) or "512" in texts


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    drawn = Plot(title="t", series={"a": [(1, 2), (2, 3)]}, x="x", y="y")
    first, second = draw({"1.svg": drawn, "2.svg": drawn}, tmp_path)
    assert first.read_bytes() == second.read_bytes()


def test_without_matplotlib_plots_are_skipped_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert draw({"new.svg": Plot(title="t", series={}, x="x", y="y")}, tmp_path) == []
    assert "plots are skipped: matplotlib is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
