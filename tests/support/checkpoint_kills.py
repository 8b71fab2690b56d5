"""A rank that is killed at a chosen moment of a save: at each call that changes files, and in the middle of a write."""

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
from tests.support.checkpoint_ranks import Bits, RankState, state_of

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
SAVES = 2
"""Saves between two deaths; in all but the first process, each of them deletes an old checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """rank: the one that dies. moment: the call before which it dies. times: counts the calls of this process."""

    rank: int
    moment: str
    times: int


class Moments:
    """Counts the calls of this process's saves, and kills it at its `death`."""

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
        """Calls in this block count."""
        self._counts = True
        yield
        self._counts = False

    def _half_write(self, stream: Any, data: Any) -> int:
        view, middle = memoryview(data).cast("B"), memoryview(data).nbytes // 2
        # The first half reaches the file before the process dies.
        self._write(stream, view[:middle])
        stream.flush()
        self.pass_by("write", stream.name)
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
    """Return the kind of a file or folder, without its numbers."""
    folder_kind = path.suffix.removeprefix(".") if path.name.startswith(".step_") else None
    if folder_kind is None and path.name.startswith(("step_", "checkpoints", "run")):
        folder_kind = "finished" if path.name.startswith("step_") else "parent"
    return f"{folder_kind} folder" if folder_kind else path.name.replace("__1_", "__0_")


def digest(bits: Bits) -> str:
    total = hashlib.sha256()
    for name, value in sorted(bits.items()):
        total.update(name.encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def undisturbed(config: Config, steps: int) -> list[str]:
    """On a rank: return digests of its state after each step, when nothing is saved; the first is for step 0."""
    rank = RankState(config)
    digests = []
    for step in range(1, steps + 1):
        rank.update(step)
        digests.append(digest(rank.bits()))
    return ["", *digests]


def resume_and_save(config: Config, expected: list[list[str]], death: Death | None) -> list[str]:
    """On a rank: resume, save each of the next steps, and die if told to; return the names of all calls.

    The rank logs events to a file, line by line, as a killed process returns nothing.
    """
    log = config.run.folder / f"log_{dist.get_rank()}.jsonl"

    def write(**line: object) -> None:
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    rank, state, digests = RankState(config), TrainState(), expected[dist.get_rank()]
    rank.checkpoints.load_latest(state)
    write(loaded=state.step, same=state == state_of(state.step) and _same(rank, digests[state.step], state.step))
    moments = Moments(death, log)
    for step in range(state.step + 1, state.step + 1 + SAVES):
        rank.update(step)
        with moments.counted():
            rank.checkpoints.save(state_of(step))
        write(saved=step, same=_same(rank, digests[step], step))
    return moments.names


def _same(rank: RankState, expected: str, step: int) -> bool:
    return step == 0 or digest(rank.bits()) == expected


def events(run: Path, rank: int) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / f"log_{rank}.jsonl").read_text().splitlines()]
