"""What a run shows of itself: a line a step, JSONL records, TensorBoard events; written by rank 0 alone."""

import json
import math
import os
import resource
import time
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from farspan.trainer.records import records

# Dense peak of the tensor cores in bfloat16, FLOP/s, from the vendors' data sheets; by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
EVALUATION_KEY = "eval_loss"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` what happens after `resumed_step`.

    Records of later steps, which the resumed run will write anew, and a line that a crash cut short are dropped first.
    """

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        path = folder / "metrics.jsonl"
        self.error: OSError | None = None
        self._evaluated = _drop_records_after(path, resumed_step)
        self._file = path.open("a", buffering=1)
        # Tells TensorBoard to forget later steps of an earlier attempt; without one it forgets nothing.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def has_evaluation(self, step: int) -> bool:
        """Return whether an evaluation of `step` is on record."""
        return step in self._evaluated

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which has a `step`; numbers and tables of numbers go to TensorBoard too.

        What is not finite is null on record. Where there is no room, `error` says so from then on: only one rank
        writes, and has to tell the others before it gives up.
        """
        try:
            self._write({name: _finite(value) for name, value in record.items()})
        except OSError as error:
            self.error = error

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if EVALUATION_KEY in record:
            self._evaluated.add(record["step"])
        for name, value in record.items():
            if isinstance(value, dict):
                for key, part in value.items():
                    if part is None:
                        continue
                    self._board.add_scalar(f"{name}/{key}", part, record["step"])
            elif name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        for file in (self._file, self._board):
            # What is still in their buffers may find no room either.
            with suppress(OSError):
                file.close()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_records_after(path: Path, step: int) -> set[int]:
    """Cut the file before the first record that is later or unreadable; return the steps evaluated before it."""
    evaluated: set[int] = set()
    if not path.exists():
        return evaluated
    kept_bytes = 0
    # Records are in the order of steps.
    for record, size in takewhile(lambda found: found[0]["step"] <= step, records(path)):
        if EVALUATION_KEY in record:
            evaluated.add(record["step"])
        kept_bytes += size
    os.truncate(path, kept_bytes)
    return evaluated


class StepTimer:
    """Seconds of each step and an estimate of what is left."""

    def __init__(self, steps_left: int) -> None:
        self._left = steps_left
        self._last = time.monotonic()
        self._mean: float | None = None

    def lap(self) -> tuple[float, float]:
        """Return (seconds since the last lap, seconds left); recent steps weigh more."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._mean = seconds if self._mean is None else 0.9 * self._mean + 0.1 * seconds
        self._left -= 1
        return seconds, self._mean * self._left

    def skip(self) -> None:
        """Leave the time since the last lap out: something other than training happened."""
        self._last = time.monotonic()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return what this rank's device can do per second, NaN if unknown: from a table for GPUs, measured for CPUs."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for part, flops in PEAK_FLOPS.items() if part in name), math.nan)
    size = 1024
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has held: allocated on a GPU, resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def progress_line(record: dict[str, Any], steps: int, seconds_left: float) -> str:
    """Return the line that a person watches."""
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    mfu = record["mfu"]
    return (
        f"step {record['step']:>6}/{steps}  {100 * record['step'] / steps:3.0f} %  loss {record['loss']:7.4f}  "
        f"grad {record['grad_norm']:6.3f}  lr {record['learning_rate']:.1e}  {record['tokens_per_s']:>9,.0f} tok/s  "
        f"mfu {'   n/a' if mfu is None else f'{100 * mfu:4.1f} %'}  {record['peak_memory_bytes'] / 2**30:5.2f} GiB  "
        f"{hours}:{minutes:02}:{seconds:02} left"
    )
