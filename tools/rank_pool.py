"""Worlds of rank processes that serve calls: started once per number of ranks, afresh after a rank has failed."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
import torch.distributed as dist

from farspan.errors import FarspanError
from farspan.parallel.comm import Traffic
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench.delayed import Delay, LateChannel

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
PRELOAD = ["farspan.tools.bench.on_rank"]
"""Imported once, in the process that all ranks are forked from."""
GRACE_S, STOP_S = 3.0, 10.0
"""How long ranks may take to tell their own failures once one has failed, and to stop."""


class RankError(FarspanError):
    """A rank raised or died; says what the first one said last."""


class Here:
    """What a rank process is and keeps between calls. kept: by whoever is called, under names of its own."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.delay, self.traffic = Delay(), Traffic()
        self.kept: dict[str, Any] = {}
        self._channels: dict[int, LateChannel] = {}

    def channel(self, width: int) -> LateChannel:
        """Return the channel of all ranks, a grid if `width`, the ranks of its inner axis, is more than 1."""
        if width not in self._channels:
            inner = outer = None
            if width > 1:
                ranks = list(range(self.ranks.world_size))
                inner = self._axis([ranks[start : start + width] for start in range(0, len(ranks), width)])
                outer = self._axis([ranks[place::width] for place in range(width)])
            world = dist.group.WORLD
            assert world is not None
            self._channels[width] = LateChannel(world, self.traffic, self.delay, inner=inner, outer=outer)
        return self._channels[width]

    def _axis(self, groups: list[list[int]]) -> LateChannel:
        group = dist.new_subgroups_by_enumeration(groups)[0]
        assert isinstance(group, dist.ProcessGroup)
        return LateChannel(group, self.traffic, self.delay)

    def align(self) -> None:
        """Wait until all ranks have come so far, and this one's GPU is done."""
        if self.ranks.world_size > 1:
            arrived = torch.zeros(1, device=self.device)
            dist.all_reduce(arrived)
            arrived.item()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for this rank's GPU, if it has one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Pool:
    """A world of ranks that serves one call at a time. device: the kind of device; of GPUs each rank has its own."""

    def __init__(self, size: int, threads: int, device: str) -> None:
        self.size, self.threads, self.device = size, threads, device
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self,
        function: Callable[Concatenate[Here, Arguments], Answer],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> list[Answer]:
        """Call a function of a module on every rank; return what each returned. Raises RankError if one did not."""
        if not self._processes:
            self._start()
        # Plain pickle: torch's own way through connections would keep a file open for every tensor.
        task = pickle.dumps((function, args, kwargs))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        for connection in pending:
            with suppress(OSError):  # it has died: there will be no answer either
                connection.send_bytes(task)
        while pending:
            # Once a rank has failed, the others may wait for it for ever.
            ready = wait(list(pending), timeout=GRACE_S if failures else None)
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, "the process died"
                (answers if succeeded else failures)[rank] = value
            if not ready:
                break
        if failures:
            self._kill()
            raise RankError(next(iter(failures.values())).strip().splitlines()[-1])
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """End all ranks, kindly at first."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(STOP_S)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="farspan-ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            ranks = Ranks(rank=rank, world_size=self.size, local_rank=rank)
            process = context.Process(
                target=_serve, args=(ranks, self.threads, self.device, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


def _serve(ranks: Ranks, threads: int, kind: str, store: str, connection: Connection) -> None:
    torch.set_num_threads(threads)
    device = torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device(kind)
    meeting = dist.FileStore(store, ranks.world_size)  # pyright: ignore[reportPrivateImportUsage]
    with connected(ranks, device, store=meeting):
        here = Here(ranks, device)
        while (task := pickle.loads(connection.recv_bytes())) is not None:
            function, args, kwargs = task
            try:
                answer = pickle.dumps((True, function(here, *args, **kwargs)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)


class Pools:
    """Pools by numbers of ranks and threads, started when they are first asked for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._pools: dict[tuple[int, int], Pool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.stop()

    def of(self, size: int, threads: int) -> Pool:
        """Return the pool of so many ranks, of so many threads each."""
        return self._pools.setdefault((size, threads), Pool(size, threads, self.device))

    def all(self) -> list[Pool]:
        """Return the pools so far."""
        return list(self._pools.values())
