"""How much of others' keys a trained model's choice needs: from a run's own folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.tools.measure_choice import main
from farspan.trainer.config import AttentionConfig, EvaluateConfig
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(folder: Path, attention: AttentionConfig) -> Path:
    """Train for three steps; return the run's folder."""
    config = tiny.config(tiny.make_data(folder), folder / "run", ParallelConfig(strategy="single"), steps=3)
    train(replace(config, attention=attention, evaluate=EvaluateConfig(sequences=1)), Ranks(), StopSignal())
    return folder / "run"


def test_shares_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With as many blocks as there are, all unmasked blocks are chosen."""
    many = AttentionConfig(mechanism="moba", options={"block": 8, "top_k": 99}, backend="cpu")
    assert main([str(trained(tmp_path, many)), "--degrees", "4"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 |")]
    assert len(rows) == 4 * 2
    assert all(row.split("|")[4].strip() == "100 %" for row in rows), rows


def test_a_run_that_chooses_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained(tmp_path, AttentionConfig(backend="cpu")))]) == 2
    assert "a run without a routed mechanism" in capsys.readouterr().err
