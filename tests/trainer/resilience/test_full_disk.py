"""A run whose folder has no more room for what it records ends with one sentence, known to all ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import TrainingError
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer import config_history, metrics
from farspan.trainer.config import EvaluateConfig
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from tests.support import tiny


def full(*arguments: object, **named: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("where", "done"), [("a record", [1, 2, 2, 3]), ("the configuration", []), ("the metrics", [])]
)
@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, done: list[int]
) -> None:
    config = tiny.config(tiny.make_data(tmp_path), tmp_path / "run", ParallelConfig(), steps=4)
    config = replace(config, evaluate=EvaluateConfig(every_steps=2, sequences=2))
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype: 1e10)
    write, written = metrics.MetricsWriter._write, []

    def third_fails(writer: metrics.MetricsWriter, record: dict[str, Any]) -> None:
        written.append(record["step"])
        return full() if len(written) == 3 else write(writer, record)

    owner, name, replaced = {
        "a record": (metrics.MetricsWriter, "_write", third_fails),
        "the configuration": (config_history, "to_toml", full),
        "the metrics": (metrics, "MetricsWriter", full),
    }[where]
    monkeypatch.setattr(owner, name, replaced)
    with pytest.raises(TrainingError, match=r"run\.folder=.*No space left on device"):
        train(config, Ranks(), StopSignal())
    # Two steps and an evaluation, which is written in vain: that is known at the next step.
    assert written == done
