import math
import re
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer import metrics
from farspan.trainer.metrics import StepTimer, peak_flops, peak_memory_bytes, progress_line
from farspan.trainer.model.config import HeadMixtureConfig
from farspan.trainer.monitoring.tags import scalars
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from tests.support import tiny
from tests.support.runs import records


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


def test_a_cpu_is_measured_in_flops_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fastest of three products: two operations, a multiplication and an addition, for each of 1024^3 pairs."""
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
    clock = iter((0.0, 3.0, 10.0, 10.5, 20.0, 22.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == 2 * 1024**3 / 0.5


def test_a_gpu_is_looked_up_and_an_unknown_one_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {
        "A100-SXM4-80GB": 312e12, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12,
        "B200": 2250e12, "GB200": 2500e12, "B300 SXM6 AC": 2250e12, "GB300": 2500e12, "Voodoo 2": math.nan,
    }  # fmt: skip
    for name, flops in gpus.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: f"NVIDIA {name}")
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == pytest.approx(flops, nan_ok=True)


def test_memory_that_a_gpu_has_reserved_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between tensors is as little there for others as the tensors."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    assert peak_memory_bytes(torch.device("cuda")) == 7


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


@pytest.mark.filterwarnings("ignore")
def test_each_number_is_documented_with_its_tag(tiny_data: Path, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    documented: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            keys, tags, _ = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|", 2))
            documented |= dict(zip_longest(keys, tags, fillvalue=""))
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=3)
    heads = HeadMixtureConfig(kind="experts", count=3, per_token=2)
    train(tiny.with_model(config, experts=tiny.EXPERTS, head_mixture=heads), Ranks(), StopSignal())
    written = [record for record in records(tmp_path / "run") if record["step"] == 3]
    keys = {key for record in written for key in record}
    assert {key for key in keys - documented.keys() if key.replace("head_", "expert_") not in keys} == set()
    assert documented.keys() - keys == {"skipped_since"}
    for record in written:
        tags = {re.sub(r"/[^/]+$", "/*", tag) if tag.count("/") > 1 else tag for tag, _ in scalars(record)}
        assert {tag for tag in tags if not tag.startswith("experts/head_")} <= set(documented.values())
