"""The watchdog: when a phase of a run hangs, every rank writes its stacks, and the process ends.

Where its thread cannot run, since other code has Python's lock, faulthandler's C thread acts a little later: stacks go
to standard error then, and the exit status is 1.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch.distributed as dist

from farspan.trainer.resilience.signals import EXIT_HUNG
from farspan.trainer.toml_config import bounded

GRACE_S = 5.0
"""How long a rank waits for others to write their stacks too: ranks that communicate with it fail when it ends."""
STANDARD_ERROR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """Time limits of a run's phases, 0 for none; at the limit ranks write their stacks into stacks/ and exit with 76.

    A limit above parallel.timeout_s comes too late: ranks that wait for others have given up by then. A process paused
    for longer counts as one that hangs.
    """

    start_s: float = bounded(1800.0, minimum=0)
    """Seconds until the first step, connecting the ranks and loading a checkpoint included."""
    step_s: float = bounded(900.0, minimum=0)
    """Seconds of a step."""
    evaluation_s: float = bounded(900.0, minimum=0)
    """Seconds of each held-out sequence of a rank."""
    save_s: float = bounded(1800.0, minimum=0)
    """Seconds of a checkpoint."""


class Watchdog:
    """Times one phase at a time of one rank; stacks go to FOLDER/PHASE_STEP/rank_RANK_HOST.txt."""

    def __init__(self, config: WatchdogConfig, folder: Path, rank: int) -> None:
        self._config, self._folder, self._rank = config, folder, rank
        self._timer: threading.Timer | None = None
        self._phase: tuple[str, int] = ("", 0)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Limit the time of the block; name: one with a limit in the configuration, as `step` has `step_s`."""
        self._phase = name, step
        self.restart()
        try:
            yield
        finally:
            self._cancel()

    def restart(self) -> None:
        """Begin the phase's time anew: it has made progress."""
        self._cancel()
        limit = getattr(self._config, f"{self._phase[0]}_s")
        if limit:
            self._timer = threading.Timer(limit, self._expire)
            self._timer.daemon = True
            self._timer.start()
            faulthandler.dump_traceback_later(limit + 3 * GRACE_S, exit=True, file=STANDARD_ERROR)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._timer = None

    def _expire(self) -> None:
        name, step = self._phase
        limit = f"watchdog.{name}_s={getattr(self._config, f'{name}_s'):g}"
        where = self._folder / f"{name}_{step:08d}" / f"rank_{self._rank}_{socket.gethostname()}.txt"
        what = f"rank {self._rank} hangs: {name} at step {step} did not end within {limit}"
        try:
            try:
                where.parent.mkdir(parents=True, exist_ok=True)
                with where.open("a") as file:
                    file.write(f"{what}; process {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
                    file.flush()
                    faulthandler.dump_traceback(file)
            except OSError:
                faulthandler.dump_traceback(STANDARD_ERROR)
            # Not through sys.stderr, whose lock the thread that hangs may hold.
            os.write(STANDARD_ERROR, f"farspan: {what}; stacks are in {where.parent}/.\n".encode())
            # NCCL's record of its last collectives, where there is NCCL.
            if dist.is_available() and dist.is_nccl_available():
                dump = import_module("torch._C._distributed_c10d")._dump_nccl_trace_json
                with suppress(OSError):
                    where.with_suffix(".nccl.json").write_bytes(dump())
            time.sleep(GRACE_S)
        finally:
            os._exit(EXIT_HUNG)
