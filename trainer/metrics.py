"""Records of a run, which the first rank writes: its configurations; a line and all metrics of each step."""

import logging
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from farspan.errors import ConfigError, TrainingError
from farspan.parallel.mesh import Mesh
from farspan.trainer.batch import BatchBuilder
from farspan.trainer.config import Config, flat
from farspan.trainer.engines.engine import Engine
from farspan.trainer.load_balance import passes_ahead
from farspan.trainer.model.flops import training_flops
from farspan.trainer.monitoring.profiler import Profiler
from farspan.trainer.monitoring.wandb_run import WandbRun
from farspan.trainer.monitoring.writers import MetricsWriter
from farspan.trainer.optim import learning_rate
from farspan.trainer.resilience.agreement import on_first_rank
from farspan.trainer.state import TrainState
from farspan.trainer.step import StepResult
from farspan.trainer.toml_config import load_config, to_toml

PEAK_FLOPS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "GB300": 2500e12, "B300": 2250e12, "GB200": 2500e12, "B200": 2250e12,
}  # fmt: skip
"""Dense peak of the tensor cores in bfloat16, FLOP/s, from the vendor's data sheets; by the first name that is part of
the device's."""

log = logging.getLogger("farspan")


class Metrics:
    """Measures and records the steps of a run; all ranks make the same calls, the first one writes."""

    def __init__(self, config: Config, engine: Engine, mesh: Mesh, batches: BatchBuilder, step: int) -> None:
        """Open the records of a run that goes on after `step`; raises TrainingError, on all ranks, if that fails."""
        train, dtype = config.train, config.train.torch_dtype
        self._folder, self._steps, self._model = Path(config.run.folder), train.steps, config.model
        self._tokens_per_step = train.sequences_per_step * config.data.sequence_tokens
        self._mechanisms, self._traffic, self._device = batches.mechanisms, batches.channel.traffic, batches.device
        micro_batches = train.sequences_per_step // mesh.degrees.data
        ahead = passes_ahead(config.model, self._mechanisms, micro_batches)
        self._fsdp_bytes = engine.sharding_bytes(mesh, dtype, micro_batches=micro_batches, passes_ahead=ahead)
        self._peak_flops = dist.get_world_size() * peak_flops(batches.device, dtype)
        self._timer = StepTimer(train.steps - step)
        self._profiler = Profiler(config.profile, self._folder, batches.device, rank=dist.get_rank(), resumed_step=step)
        self._writer: MetricsWriter | None = None
        self._wandb: WandbRun | None = None
        on_first_rank(lambda: self._open(config, step))

    def _open(self, config: Config, step: int) -> None:
        with writing_to(self._folder):
            self._writer = MetricsWriter(self._folder, resumed_step=step)
            if config.metrics.wandb_project is not None:
                self._wandb = WandbRun(config.metrics.wandb_project, self._folder, flat(config), resumed_step=step)

    def close(self) -> None:
        self._profiler.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.close()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Count time and traffic of the block, which leaves out those since the step before; profile it if asked to."""
        self._timer.restart()
        self._traffic.take()
        with self._profiler.step(step):
            yield

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self._device)

    def log_step(self, result: StepResult, state: TrainState, *, learning_rate: float, memory: int) -> None:
        """Record a step. memory: the peak of any rank, in bytes; traffic is that of the first rank."""
        seconds, seconds_left = self._timer.lap()
        if self._writer is None:
            return
        traffic = self._traffic.take()
        if self._fsdp_bytes is not None:
            traffic.add("fsdp", sent=self._fsdp_bytes, received=self._fsdp_bytes)
        flops = training_flops(self._model, self._mechanisms, self._tokens_per_step, result.attention_flops)
        mfu = flops / seconds / self._peak_flops
        record = {
            "step": state.step,
            "loss": result.loss,
            "grad_norm": result.gradient_norm,
            "tokens_per_s": self._tokens_per_step / seconds,
            "mfu": mfu if math.isfinite(mfu) else None,
            "peak_memory_bytes": memory,
            "comm_bytes": traffic.sent.total(),
            "comm_bytes_by_kind": dict(traffic.sent),
            "comm_bytes_received_by_kind": dict(traffic.received),
            "learning_rate": learning_rate,
            "tokens": state.tokens,
            "step_s": seconds,
            "stream": state.stream,
            "skipped": state.skipped,
            **({} if result.skipped is None else {"skipped_since": result.skipped}),
            **({} if result.experts is None else result.experts.summary("expert")),
            **({} if result.heads is None else result.heads.summary("head")),
        }
        self.write(record)
        log.info("%s", progress_line(record, self._steps, seconds_left))
        if result.skipped is not None:
            log.info("skipped     step %d, no update: %s", state.step, result.skipped)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record, which has a `step`."""
        if self._writer is not None:
            self._writer.write(record)
        if self._wandb is not None:
            self._wandb.log(record)

    def has_evaluation(self, step: int) -> bool:
        """Return on all ranks whether an evaluation of `step` is on record."""
        return on_first_rank(lambda: self._writer is not None and self._writer.has_evaluation(step))

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write a record; see `check`."""
        return self._writer is not None and self._writer.error is not None

    def check(self) -> None:
        """Raise TrainingError on all ranks if a record could not be written."""
        on_first_rank(self._raise_error)

    def _raise_error(self) -> None:
        if self._writer is not None and self._writer.error is not None:
            with writing_to(self._folder):
                raise self._writer.error


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError, such as that of a full disk, into a TrainingError."""
    try:
        yield
    except OSError as error:
        at = "" if error.filename is None else f" at {os.fsdecode(error.filename)}"
        raise TrainingError(
            f"run.folder={str(folder)!r} cannot be written{at} ({error.strerror or error}): make room, and the same "
            "command goes on from the last checkpoint."
        ) from None


def record_config(folder: Path, config: Config, step: int) -> None:
    """Write `config.toml` of a run that goes on at `step`; keep one with other settings as `config_until_step_N.toml`.

    Logs the changes. Raises TrainingError where the folder cannot be written.
    """
    path, until = folder / "config.toml", folder / f"config_until_step_{step}.toml"
    # If it exists, the configuration that replaced it reached no later checkpoint: its steps are undone.
    before = until if until.exists() else path
    with writing_to(folder):
        if step > 0 and before.exists():
            changes = _changes(before, config, step)
            if changes:
                log.info("changed     %s; see %s", ", ".join(changes), until)
            elif before == path:
                return
            if before == path:
                path.rename(until)
        elif step > 0:
            log.info("written     %s, which was missing: what has changed since step %d is not known", path, step)
        path.write_text(to_toml(config))


def _changes(path: Path, config: Config, step: int) -> list[str]:
    """Return what differs from an earlier configuration, and what this means for the learning rate at `step`."""
    try:
        earlier = load_config(Config, path)
    except ConfigError as error:
        return [f"{path.name}, which this version cannot read: {str(error).rstrip('.')}"]
    before, after = flat(earlier), flat(config)
    changes = [
        f"{name} {before.get(name, 'unset')} -> {after.get(name, 'unset')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]

    def rate(of: Config, at: int) -> float:
        # A run that was finished had no further step: its schedule ends with the rate after the last one.
        return learning_rate(of.optimizer, min(at, of.train.steps), of.train.steps)

    if rate(earlier, step) != rate(config, step):
        changes.append(
            f"so that the learning rate of step {step + 1} is {rate(config, step):.4g} instead of "
            f"{rate(earlier, step):.4g}, after {rate(earlier, step - 1):.4g} in step {step}"
        )
    return changes


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

    def restart(self) -> None:
        """Leave out the time since the last lap: something other than training happened."""
        self._last = time.monotonic()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s of this rank's device, NaN if unknown: from a table for GPUs, measured for CPUs."""
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
    """Return the peak memory of this rank: reserved by torch's allocator on a GPU, resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def progress_line(record: dict[str, Any], steps: int, seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    mfu = record["mfu"]
    return (
        f"step {record['step']:>6}/{steps}  {100 * record['step'] / steps:3.0f} %  loss {record['loss']:7.4f}  "
        f"grad {record['grad_norm']:6.3f}  lr {record['learning_rate']:.1e}  {record['tokens_per_s']:>9,.0f} tok/s  "
        f"mfu {'   n/a' if mfu is None else f'{100 * mfu:4.1f} %'}  {record['peak_memory_bytes'] / 2**30:5.2f} GiB  "
        f"{hours}:{minutes:02}:{seconds:02} left"
    )
