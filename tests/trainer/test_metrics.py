import math
from pathlib import Path

import pytest
import torch

from farspan.trainer import metrics
from farspan.trainer.metrics import StepTimer, peak_flops, peak_memory_bytes, progress_line


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
