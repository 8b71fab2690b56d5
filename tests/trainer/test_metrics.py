import math
from pathlib import Path

import pytest
import torch

from farspan.trainer import metrics
from farspan.trainer.metrics import MetricsWriter, StepTimer, peak_flops, peak_memory_bytes, progress_line
from tests.support.runs import records


def write(folder: Path, steps: range, *, resumed_step: int, value: float) -> None:
    writer = MetricsWriter(folder, resumed_step=resumed_step)
    for step in steps:
        writer.write({"step": step, "loss": value + step, "sent": {"ring": step}, "mfu": None})
        if step % 2 == 0:
            writer.write({"step": step, "eval_loss": value})
    writer.close()


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), resumed_step=0, value=100.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, range(4, 8), resumed_step=3, value=200.0)
    losses = [(record["step"], record["loss"]) for record in records(tmp_path) if "loss" in record]
    assert losses == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0), (6, 206.0), (7, 207.0)]
    assert [record["eval_loss"] for record in records(tmp_path) if "eval_loss" in record] == [100.0, 200.0, 200.0]


@pytest.mark.parametrize(
    "tail",
    ['{"step": 2', '{"step": 2}', "null\n", '{"loss": 1}\n', "\x00\x00\x00\n"],
    ids=["half a line", "no line end", "no record", "no step", "zeros of a lost page"],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n' + tail)
    MetricsWriter(tmp_path, resumed_step=9).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.5}\n'


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), resumed_step=0, value=1.0)
    write(tmp_path, range(1, 2), resumed_step=0, value=2.0)
    assert [record["loss"] for record in records(tmp_path)] == [3.0]


def test_it_knows_which_steps_were_evaluated(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), resumed_step=0, value=1.0)
    writer = MetricsWriter(tmp_path, resumed_step=3)
    assert [writer.has_evaluation(step) for step in range(1, 6)] == [False, True, False, False, False]
    writer.write({"step": 5, "eval_loss": 1.0})
    assert writer.has_evaluation(5)
    writer.close()


def test_a_number_that_json_does_not_have_is_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0)
    writer.write({"step": 1, "loss": math.nan, "load": {"0": math.inf, "1": 2.0}, "why": "the loss is nan"})
    writer.close()
    assert records(tmp_path) == [{"step": 1, "loss": None, "load": {"0": None, "1": 2.0}, "why": "the loss is nan"}]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_the_resumed_steps_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 6), resumed_step=0, value=100.0)
    write(tmp_path, range(4, 7), resumed_step=3, value=200.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0), (6, 206.0)]
    assert [event.value for event in events.Scalars("sent/ring")] == [1, 2, 3, 4, 5, 6]


def test_the_timer_leaves_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    timer = StepTimer(4)
    now[0] = 2.0
    assert timer.lap() == (2.0, 3 * 2.0)
    now[0] = 50.0
    timer.restart()
    now[0] = 54.0
    # Mean of 0.9 * 2 + 0.1 * 4 seconds, two steps left.
    assert timer.lap() == (4.0, pytest.approx(4.4))


def test_peak_memory_is_that_of_the_process() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    high_water_bytes = int(status["VmHWM"].split()[0]) * 1024
    # The kernel's two counters differ by some pages; a process also inherits the mark of the one that started it.
    assert 0.95 * high_water_bytes < peak_memory_bytes(torch.device("cpu")) < 100 * high_water_bytes


def test_a_cpu_is_measured_in_flops_per_second() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_a_gpu_is_looked_up_and_an_unknown_one_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, flops in {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "Voodoo 2": math.nan}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: f"NVIDIA {name}")
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == pytest.approx(flops, nan_ok=True)


def test_progress_line() -> None:
    record = {
        "step": 30, "loss": 2.5, "grad_norm": 0.125, "learning_rate": 3e-4, "tokens_per_s": 12345.6, "mfu": 0.4,
        "peak_memory_bytes": 3 * 2**29,
    }  # fmt: skip
    assert progress_line(record, 120, 3725.4) == (
        "step     30/120   25 %  loss  2.5000  grad  0.125  lr 3.0e-04     12,346 tok/s  mfu 40.0 %   1.50 GiB  "
        "1:02:05 left"
    )
    assert "mfu    n/a" in progress_line(record | {"mfu": None}, 120, 0.0)
