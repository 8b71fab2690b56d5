"""A rank that is killed at a chosen moment of a save: each call that changes files is one, and so is half a write."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from farspan.trainer.checkpoint import shards
from farspan.trainer.config import Config
from farspan.trainer.state import TrainState
from tests.support.checkpoint_ranks import Bits, Side, state_of

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
SAVES = 2
"""Of one life; in all but the first, each of them drops an old checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """rank: who dies. moment: before what. times: the how many-th time in this life."""

    rank: int
    moment: str
    times: int


class Moments:
    """Counts the moments of this process's saves, and ends it at the one where it has to die."""

    def __init__(self, death: Death | None, log: Path) -> None:
        self.names: list[str] = []
        self._death = death if death is not None and death.rank == dist.get_rank() else None
        self._log, self._counts = log, False
        self._write, self._fsync = shards._HashedStream.write, os.fsync
        shards._HashedStream.write = lambda stream, data: self._half_write(stream, data)  # pyright: ignore
        os.fsync = self._before_fsync
        sys.addaudithook(self._audit)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """What changes files in this block is a moment."""
        self._counts = True
        yield
        self._counts = False

    def _half_write(self, stream: Any, data: Any) -> int:
        view, middle = memoryview(data).cast("B"), memoryview(data).nbytes // 2
        # What was handed over is in the file when the process dies, as if the system had written it out.
        self._write(stream, view[:middle])
        stream.flush()
        self.pass_by("write", stream._file.name)
        self._write(stream, view[middle:])
        return view.nbytes

    def _before_fsync(self, descriptor: int) -> None:
        self.pass_by("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not set(str(arguments[1])) & set("wxa+")):
            return
        self.pass_by(event.removeprefix("os."), str(arguments[0]))

    def pass_by(self, event: str, path: str) -> None:
        if not self._counts:
            return
        name = f"{event} {_kind(Path(path))}"
        self.names.append(name)
        death = self._death
        if death is not None and name == death.moment and self.names.count(name) == death.times:
            self._counts = False
            descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND)
            os.write(descriptor, (json.dumps({"died": self.names[-1]}) + "\n").encode())
            os.kill(os.getpid(), signal.SIGKILL)


def _kind(path: Path) -> str:
    """Return what a file is in a checkpoint, without its numbers."""
    of_folder = path.suffix.removeprefix(".") if path.name.startswith(".step_") else None
    if of_folder is None and path.name.startswith(("step_", "checkpoints", "run")):
        of_folder = "finished" if path.name.startswith("step_") else "parent"
    return f"{of_folder} folder" if of_folder else path.name.replace("__1_", "__0_")


def digest(bits: Bits) -> str:
    total = hashlib.sha256()
    for name, value in sorted(bits.items()):
        total.update(name.encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def undisturbed(config: Config, steps: int) -> list[str]:
    """On a rank: return what it holds after each step, the first before any, when nothing is saved."""
    side = Side(config)
    found = []
    for step in range(1, steps + 1):
        side.update(step)
        found.append(digest(side.bits()))
    return ["", *found]


def live(config: Config, expected: list[list[str]], death: Death | None) -> list[str]:
    """On a rank: resume, go on for some steps, each of them saved, and die if it has to; return all moments.

    What happens is written to a log of the rank, line by line, since the dead return nothing.
    """
    rank = dist.get_rank()
    log = config.run.folder / f"log_{rank}.jsonl"

    def write(**line: object) -> None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    side, state = Side(config), TrainState()
    side.checkpoints.load_latest(state)
    write(loaded=state.step, same=state == state_of(state.step) and _same(side, expected[rank][state.step], state.step))
    moments = Moments(death, log)
    for step in range(state.step + 1, state.step + 1 + SAVES):
        side.update(step)
        with moments.counted():
            side.checkpoints.save(state_of(step))
        write(saved=step, same=_same(side, expected[rank][step], step))
    return moments.names


def _same(side: Side, expected: str, step: int) -> bool:
    return step == 0 or digest(side.bits()) == expected


def events(run: Path, rank: int) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / f"log_{rank}.jsonl").read_text().splitlines()]
