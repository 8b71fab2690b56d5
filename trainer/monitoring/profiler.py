"""torch's profiler, and the history of CUDA memory, for chosen steps and ranks."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from farspan.trainer.toml_config import bounded

MAX_ALLOCATIONS = 1_000_000
"""Events of the memory history; older ones are dropped."""

log = logging.getLogger("farspan")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Traces by torch's profiler, profile/step_STEP/rank_RANK.trace.json.gz in the run's folder, for ui.perfetto.dev.

    A profiled step takes longer than others, and its speed in the metrics is that of the profiled step.
    """

    steps: tuple[int, ...] = bounded((), minimum=1)
    """Steps to trace, such as [10, 11, 12]. Consecutive ones share a trace, with what happens between them; the step
    before the first warms the profiler up."""
    ranks: tuple[int, ...] = bounded((0,), minimum=0)
    """Ranks that trace these steps."""
    memory: bool = False
    """Also write what was allocated in these steps, and where, rank_RANK.memory.pickle, for pytorch.org/memory_viz;
    needs a GPU."""


class Profiler:
    """Profiles this rank's chosen steps; on other ranks, and in other steps, it does nothing."""

    def __init__(
        self, config: ProfileConfig, folder: Path, device: torch.device, *, rank: int, resumed_step: int
    ) -> None:
        """folder: the run's. resumed_step: steps up to it are not made any more."""
        self._folder, self._rank, self._is_cuda = folder / "profile", rank, device.type == "cuda"
        self._keeps_memory = config.memory
        left = {step for step in config.steps if step > resumed_step}
        self._steps = left if rank in config.ranks else set()
        self._running = ExitStack()
        self._profile: profile | None = None
        if config.steps:
            steps, ranks = (", ".join(map(str, numbers)) for numbers in (sorted(left), config.ranks))
            chosen = (
                f"steps {steps} on ranks {ranks}, to {self._folder}/" if left else "nothing: profile.steps are done"
            )
            log.info("profile     %s", chosen)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the block, which is `step`, if it was chosen; warm up in the one before."""
        if not self._steps:
            yield
            return
        is_chosen, is_next = step in self._steps, step + 1 in self._steps
        if self._profile is None and (is_chosen or is_next):
            self._start(first=step if is_chosen else step + 1)
        if self._profile is not None and is_chosen:
            self._profile.step()
        yield
        if is_chosen and not is_next:
            self.close()

    def close(self) -> None:
        """End the trace that is under way, if there is one, and write the steps that it has."""
        self._running.close()
        self._profile = None

    def _start(self, *, first: int) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
        self._profile = profile(
            activities=activities,
            schedule=lambda step: ProfilerAction.WARMUP if step < first else ProfilerAction.RECORD,
            on_trace_ready=lambda ready: self._write(ready, first),
            record_shapes=True,
        )
        # The trace names its steps by the profiler's own count.
        self._profile.step_num = first - 1
        if self._keeps_memory:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
            self._running.callback(torch.cuda.memory._record_memory_history, enabled=None)
        self._running.enter_context(self._profile)

    def _write(self, ready: profile, first: int) -> None:
        """Write the files of a trace that begins with step `first`; an error is logged, and the run goes on."""
        folder = self._folder / f"step_{first:08d}"
        # A run that died after this step and resumed before it has a trace of it: keep both.
        names = (f"rank_{self._rank}{f'.{number}' if number > 1 else ''}" for number in count(1))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = next(path for name in names if not (path := folder / f"{name}.trace.json.gz").exists())
            partial = path.with_name(f".{path.name}")
            ready.export_chrome_trace(str(partial))
            partial.rename(path)
            if self._keeps_memory:
                snapshot = path.with_name(path.name.replace(".trace.json.gz", ".memory.pickle"))
                torch.cuda.memory._dump_snapshot(str(snapshot))
        except (OSError, RuntimeError) as error:
            log.warning("profile     of step %d on rank %d could not be written: %s", first, self._rank, error)
        else:
            log.info("profile     %s", path)
