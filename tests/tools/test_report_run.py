"""The report of runs, from folders that real runs wrote."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.tools import report_run
from farspan.tools.report_run import Run, main
from farspan.trainer.config import EvaluateConfig
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.model.flops import matrix_parameters, total_parameters
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = ExpertsConfig(count=4, per_token=2, feed_forward=24, bias_rate=0.01, capacity=0.75, layers="dense, experts")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `plain`, which is evaluated, and `mixed`, of 3 steps each."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny.make_data(folder)
    plain = tiny.config(data, folder / "plain", ParallelConfig(strategy="single"), steps=3)
    mixed = tiny.with_model(
        tiny.config(data, folder / "mixed", ParallelConfig(strategy="single"), steps=3), experts=EXPERTS
    )
    for config in (plain, mixed):
        train(replace(config, evaluate=EvaluateConfig(sequences=2)), Ranks(), StopSignal())
    return folder


def cells(text: str, first: str) -> list[str]:
    """Of the only row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_two_runs_side_by_side(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "both"
    assert main([str(runs / "plain"), str(runs / "mixed"), "--out", str(out)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    plots = ["loss", "validation", "expert_load", "expert_entropy", "expert_dropped", "expert_bias"]
    assert [path.name for path in written] == ["both.md", *(f"both_{what}.svg" for what in plots)]
    text = out.with_suffix(".md").read_text()
    for path in written[1:]:
        ElementTree.fromstring(path.read_text())
        assert f"]({path.name})" in text
    for name in ("plain", "mixed"):
        run = Run.read(runs / name, name)
        config, (evaluation,) = run.config, run.evaluations
        row = cells(text, name)
        assert row[1:3] == ["3", f"{run.updates[-1]['tokens']:,}"]
        assert row[3] == f"{total_parameters(config.model, config.mechanisms()):,}"
        assert row[4] == f"{matrix_parameters(config.model, config.mechanisms()):,}"
        assert row[5].startswith(f"{evaluation['bits_per_byte']:.3f} at step 3 ")
    mixed = Run.read(runs / "mixed", "mixed")
    assert mixed.layers == ["0"], "layers without experts are not numbered"
    loads = [record["expert_load"]["0"] for record in mixed.updates]
    assert cells(text, "plain")[6] == ""
    assert cells(text, "mixed")[6] == f"{sum(loads) / 3:.2f}"
    assert cells(text, "0")[:3] == ["0", f"{sum(loads) / 3:.2f}", f"{max(loads):.2f}"]
    assert "mixed, layer 0" in (out.parent / "both_expert_load.svg").read_text()
    assert "plain" not in (out.parent / "both_expert_load.svg").read_text()


def test_a_run_in_progress_is_reported_into_its_own_folder(runs: Path, tmp_path: Path) -> None:
    """Without an evaluation so far, and with half a line at the end."""
    folder = shutil.copytree(runs / "plain", tmp_path / "running")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    assert main([str(folder)]) == 0
    row = cells((folder / "report.md").read_text(), "running")
    assert row[1] == "2 of 3"
    assert row[5:7] == ["not yet", ""]
    assert sorted(path.name for path in folder.glob("report*")) == ["report.md", "report_loss.svg"]


def test_runs_of_one_name_are_named_by_their_folders(runs: Path, tmp_path: Path) -> None:
    again = shutil.copytree(runs / "plain", tmp_path / "plain")
    assert main([str(runs / "plain"), str(again), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both.md").read_text()
    assert cells(text, str(again))[1:6] == cells(text, str(runs / "plain"))[1:6]


def test_points_of_long_runs_are_means_of_consecutive_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_run, "MAX_POINTS", 3)
    updates = [{"step": step, "loss": 10.0 * step, "expert_load": {"0": step}} for step in range(1, 8)]
    run = Run(name="long", config=None, updates=updates, evaluations=[])  # pyright: ignore[reportArgumentType]
    assert run.over_steps("loss") == [(2, 20), (5, 50), (7, 70)]
    assert run.over_steps("expert_load", "0") == [(2, 2), (5, 5), (7, 7)]


def test_a_run_without_bits_per_byte(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    path = tmp_path / "plain" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{key: value for key, value in record.items() if not key.endswith("bits_per_byte")} for record in found]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
    assert main([str(tmp_path / "plain"), "--out", str(tmp_path / "made")]) == 0
    assert "unknown" in cells((tmp_path / "made.md").read_text(), "plain")
    assert not (tmp_path / "made_validation.svg").exists()


def test_a_folder_without_a_run_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "plain"), str(tmp_path), "--out", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/metrics.jsonl does not exist")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval_loss": 1.0}) + "\n")
    assert main([str(tmp_path)]) == 2
    assert "has no step yet" in capsys.readouterr().err
    assert list(tmp_path.glob("*.md")) == []
