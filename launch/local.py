"""Ranks on this machine: torchrun in a session of its own, so that Ctrl-C reaches the ranks once and in order."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalJob:
    """`num_ranks` processes that run `farspan train config overrides`."""

    config: Path
    overrides: tuple[str, ...]
    num_ranks: int

    def arguments(self) -> list[str]:
        """Return the command that starts the ranks."""
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(self.num_ranks),
        ]
        return [*torchrun, "-m", "farspan.launch.cli", "train", str(self.config), *self.overrides]

    def command_line(self) -> str:
        """Return the command as one would type it, with its threads per rank."""
        return f"OMP_NUM_THREADS={self.threads_per_rank()} {shlex.join(self.arguments())}"

    def threads_per_rank(self) -> int:
        return max(len(os.sched_getaffinity(0)) // self.num_ranks, 1)

    def run(self) -> int:
        """Start the ranks, wait for them and return torchrun's exit status.

        The first SIGINT or SIGTERM asks the ranks to save and exit; a second one ends them at once.
        """
        process = subprocess.Popen(
            ["env", f"OMP_NUM_THREADS={self.threads_per_rank()}", *self.arguments()], start_new_session=True
        )
        stopping = False

        def pass_on(number: int, frame: FrameType | None) -> None:
            nonlocal stopping
            if stopping:
                os.killpg(process.pid, signal.SIGKILL)
                return
            stopping = True
            print("\nstopping    after this step, with a checkpoint; Ctrl-C again to end at once", flush=True)
            for child in _children(process.pid):
                os.kill(child, signal.SIGINT)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        return process.wait()


def _children(pid: int) -> list[int]:
    """Return the child processes of `pid`, by its threads' lists."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]
