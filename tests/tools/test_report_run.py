"""The report of runs, from folders that real runs wrote."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.tools import report_run
from farspan.tools.bench import report as bench_report
from farspan.tools.report_run import Run, main
from farspan.trainer.config import EvaluateConfig
from farspan.trainer.model.config import ExpertsConfig
from farspan.trainer.model.flops import matrix_parameters, total_parameters
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.toml_config import toml_value
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


@pytest.fixture
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a report."""
    monkeypatch.setattr(bench_report, "draw", lambda plots, folder: [])


def cells(text: str, first: str) -> list[str]:
    """Of the only row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_two_runs_side_by_side(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "both"
    assert main([str(runs / "plain"), str(runs / "mixed"), "--out", str(out)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    compared = ["loss", "validation_loss", "validation"]
    plots = [*compared, *(f"{key}_by_{axis}" for axis in ("tokens", "minutes") for key in compared)]
    plots += ["positions", "expert_load", "expert_entropy", "expert_dropped", "expert_bias"]
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
        assert row[5] == f"{evaluation['eval_loss']:.4f} at step 3"
        assert row[6].startswith(f"{evaluation['bits_per_byte']:.3f} (frequencies: ")
        assert row[9] == f"{sum(record['step_s'] for record in run.updates) / 60:.1f}"
    mixed = Run.read(runs / "mixed", "mixed")
    assert mixed.layers == ["0"], "layers without experts are not numbered"
    loads = [record["expert_load"]["0"] for record in mixed.updates]
    assert cells(text, "plain")[7] == ""
    assert cells(text, "mixed")[7] == f"{sum(loads) / 3:.2f}"
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
    assert row[5:8] == ["not yet", "", ""]
    assert sorted(path.name for path in folder.glob("report*")) == [
        "report.md", "report_loss.svg", "report_loss_by_minutes.svg", "report_loss_by_tokens.svg"
    ]  # fmt: skip


@pytest.mark.usefixtures("_without_plots")
def test_runs_of_one_name_are_named_by_their_folders(runs: Path, tmp_path: Path) -> None:
    again = shutil.copytree(runs / "plain", tmp_path / "plain")
    assert main([str(runs / "plain"), str(again), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both.md").read_text()
    assert cells(text, str(again))[1:6] == cells(text, str(runs / "plain"))[1:6]


def test_only_what_differs_between_configurations_is_listed(runs: Path) -> None:
    plain, mixed = (Run.read(runs / name, name) for name in ("plain", "mixed"))
    lines = [line.strip("| ").split(" | ") for line in report_run.differences([plain, mixed]).splitlines()]
    assert lines[0] == ["setting", "plain", "mixed"]
    keys = [part.name for part in fields(ExpertsConfig)]
    rows = {key: [toml_value(getattr(experts, key)) for experts in (ExpertsConfig(), EXPERTS)] for key in keys}
    different = {key: row for key, row in rows.items() if row[0] != row[1]}
    assert {line[0]: line[1:] for line in lines[2:]} == {f"model.experts.{key}": row for key, row in different.items()}
    assert len(different) >= 5
    again = replace(plain, name="again", config=tiny.with_model(plain.config))
    assert report_run.differences([plain, again]) == "Nothing but the folder.\n"


def test_loss_by_position_is_side_by_side(runs: Path, tmp_path: Path) -> None:
    longer = shutil.copytree(runs / "mixed", tmp_path / "longer")
    lines = (longer / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"loss_by_position": {"0-63": 2.5, "64-127": 2.25, "128-255": 2.0}}
    (longer / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert main([str(runs / "plain"), str(longer), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both.md").read_text()
    plain = Run.read(runs / "plain", "plain").evaluations[-1]["loss_by_position"]
    assert list(plain) == ["0-63", "64-100"]
    assert cells(text, "0-63") == ["0-63", f"{plain['0-63']:.4f}", "2.5000"]
    assert cells(text, "64-100") == ["64-100", f"{plain['64-100']:.4f}", ""]
    assert cells(text, "128-255") == ["128-255", "", "2.0000"]
    svg = (tmp_path / "both_positions.svg").read_text()
    assert all(f">{tick}<" in svg for tick in (64, 101, 128, 256))


@pytest.mark.usefixtures("_without_plots")
def test_runs_are_placed_on_each_axis(tmp_path: Path, runs: Path) -> None:
    """A step that was skipped has no loss, but its tokens and its time count."""
    folder = shutil.copytree(runs / "plain", tmp_path / "placed")
    written = [
        {"step": 1, "loss": 5.0, "tokens": 100, "step_s": 30.0, "tokens_per_s": 3.0},
        {"step": 2, "loss": None, "tokens": 210, "step_s": 60.0, "tokens_per_s": 2.0},
        {"step": 2, "eval_loss": 4.5, "eval_tokens": 50, "bits_per_byte": 1.5, "unigram_bits_per_byte": 4.0},
        {"step": 3, "loss": 4.0, "tokens": 300, "step_s": 30.0, "tokens_per_s": 3.0},
        {"step": 3, "eval_loss": 4.25, "eval_tokens": 50},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    run = Run.read(folder, "placed")
    assert run.line("loss") == [(1, 5.0), (3, 4.0)]
    assert run.line("loss", over="tokens") == [(100, 5.0), (300, 4.0)]
    assert run.line("loss", over="minutes") == [(0.5, 5.0), (2.0, 4.0)]
    assert run.evaluated("eval_loss", over="tokens") == [(210, 4.5), (300, 4.25)]
    assert run.evaluated("eval_loss", over="minutes") == [(1.5, 4.5), (2.0, 4.25)]
    assert run.evaluated("bits_per_byte") == [(2, 1.5)]
    assert main([str(folder)]) == 0
    assert cells((folder / "report.md").read_text(), "placed")[5:7] == ["4.2500 at step 3", "unknown"]


@pytest.mark.usefixtures("_without_plots")
def test_tables_describe_the_last_steps_of_each_layer(
    tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that differ between steps, layers and columns; the first step is before the last two."""
    monkeypatch.setattr(report_run, "LAST_STEPS", 2)
    folder = shutil.copytree(runs / "mixed", tmp_path / "told")
    written = [
        {
            "step": step, "loss": 5.0 - step, "tokens": 100 * step, "step_s": 6.0, "tokens_per_s": speed,
            "expert_load": {"0": load, "3": 2 * load}, "expert_entropy": {"0": 0.9 - load / 10, "3": 0.5},
            "expert_dropped": {"0": load / 100, "3": 0.25}, "expert_bias": {"0": load / 4, "3": 7.0},
        }
        for step, speed, load in ((1, 3000.0, 9.0), (2, 1000.0, 1.5), (3, 1100.0, 2.5))
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    assert main([str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "## Experts of told, last 2 steps" in text
    assert cells(text, "layer") == ["layer", "load, mean", "load, worst", "entropy", "dropped", "range of biases"]
    assert cells(text, "0") == ["0", "2.00", "2.50", "0.700", "2.0%", "0.50"]
    assert cells(text, "3") == ["3", "4.00", "5.00", "0.500", "25.0%", "7.00"]
    # The layer with the highest mean; the median speed; the time of all steps.
    assert cells(text, "told")[7:10] == ["4.00", "1,100", "0.3"]


@pytest.mark.usefixtures("_without_plots")
def test_each_validation_set_has_a_line_of_its_own(runs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs / "plain", tmp_path / "sets")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    of_code = {"code_loss": 1.5, "code_bits_per_byte": 0.5, "code_loss_by_position": {"0-63": 1.75, "64-100": 1.25}}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | of_code)]) + "\n")
    run = Run.read(folder, "sets")
    plots = report_run.plots_of([run])
    own = run.evaluations[-1]
    assert plots["validation_loss"].series == {"sets": [(3, own["eval_loss"])], "sets, code": [(3, 1.5)]}
    assert plots["validation"].series == {"sets": [(3, own["bits_per_byte"])], "sets, code": [(3, 0.5)]}
    assert plots["positions"].series["sets, code"] == [(64, 1.75), (101, 1.25)]
    assert main([str(folder)]) == 0
    assert cells((folder / "report.md").read_text(), "0-63")[1:] == [f"{own['loss_by_position']['0-63']:.4f}", "1.7500"]


@pytest.mark.usefixtures("_without_plots")
def test_an_earlier_configuration_of_a_run_is_named(runs: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(runs / "plain", tmp_path / "went_on")
    shutil.copy(folder / "config.toml", folder / "config_until_step_00000002.toml")
    assert main([str(folder)]) == 0
    assert f"- went_on: {folder}/config_until_step_00000002.toml" in (folder / "report.md").read_text()


def test_points_of_long_runs_are_means_of_consecutive_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_run, "MAX_POINTS", 3)
    updates = [{"step": step, "loss": 10.0 * step, "expert_load": {"0": step}} for step in range(1, 8)]
    run = Run(name="long", config=None, updates=updates, evaluations=[])  # pyright: ignore[reportArgumentType]
    assert run.line("loss") == [(2, 20), (5, 50), (7, 70)]
    assert run.line("expert_load", "0") == [(2, 2), (5, 5), (7, 7)]


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
