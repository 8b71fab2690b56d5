"""Pools of rank processes, for benchmarks and tests: a world is started once, then a call costs milliseconds.

`run` sends a module-level function to every rank and returns the results. A rank that raises, dies or does not answer
in time makes `run` raise; the pool is then started afresh by the next call.
"""

import functools
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from farspan.errors import FarspanError
from farspan.parallel.ranks import Ranks

GRACE_S = 3.0
"""How long the others may take to report their own failures once a rank has failed."""
STOP_S = 10.0

Join = Callable[[Ranks, dist.Store], AbstractContextManager[tuple[object, ...]]]  # pyright: ignore[reportPrivateImportUsage]
"""Entered by each rank process: joins the process group that meets at the store, and returns the first arguments of
every call."""


class RankError(FarspanError):
    """A rank raised, died or did not answer: all tracebacks; `summary`: the last line of the first one."""

    def __init__(self, failures: dict[int, str], size: int) -> None:
        super().__init__("\n".join(f"--- rank {rank} of {size}\n{text}" for rank, text in failures.items()))
        self.summary = next(iter(failures.values())).strip().splitlines()[-1]


@functools.cache
def grid_groups(width: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """On a rank: return its inner group, `width` neighbors, and its outer group; all ranks have to call."""
    ranks = list(range(dist.get_world_size()))
    inner = [ranks[start : start + width] for start in range(0, len(ranks), width)]
    outer = [ranks[column::width] for column in range(width)]
    return tuple(dist.new_subgroups_by_enumeration(axis)[0] for axis in (inner, outer))  # pyright: ignore[reportReturnType]


class RankPool(AbstractContextManager["RankPool"]):
    """A world of ranks that serves one call at a time.

    preload: the module that the server of all processes imports before it forks them. timeout_s: of a call.
    """

    def __init__(self, size: int, join: Join, *, preload: str, timeout_s: float | None = None) -> None:
        self.size, self._join, self._preload, self.timeout_s = size, join, preload, timeout_s
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *arguments: object, grace_s: float = GRACE_S) -> list[Any]:
        """Call the function on every rank; return the results in the order of the ranks. Raises RankError."""
        if not self._processes:
            self._start()
        # Plain pickle: torch's own way through connections would keep a file open for every tensor.
        task = pickle.dumps((function, arguments))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        for connection in pending:
            with suppress(OSError):  # it has died: there will be no answer either
                connection.send_bytes(task)
        while pending:
            # Once a rank has failed, the others may wait for it forever.
            ready = wait(list(pending), timeout=grace_s if failures else self.timeout_s)
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, "the process died"
                (results if succeeded else failures)[rank] = value
            if not ready:
                failures |= dict.fromkeys(pending.values(), "no answer")
                break
        if failures:
            self.kill()
            raise RankError(failures, self.size)
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """Let all ranks leave their process group and end; kill those that do not."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(STOP_S)
        self.kill()

    def kill(self) -> None:
        """End all ranks at once."""
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
        context.set_forkserver_preload([self._preload])
        self._folder = tempfile.TemporaryDirectory(prefix="farspan-ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.size):
            parent_end, child_end = context.Pipe()
            ranks = Ranks(rank=rank, world_size=self.size, local_rank=rank)
            process = context.Process(target=_serve, args=(self._join, ranks, store, child_end), daemon=True)
            process.start()
            child_end.close()
            self._processes.append(process)
            self._connections.append(parent_end)


def _serve(join: Join, ranks: Ranks, store: str, connection: Connection) -> None:
    meeting = dist.FileStore(store, ranks.world_size)  # pyright: ignore[reportPrivateImportUsage]
    with join(ranks, meeting) as first_arguments:
        while (task := pickle.loads(connection.recv_bytes())) is not None:
            try:
                function, arguments = task
                answer = pickle.dumps((True, function(*first_arguments, *arguments)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)
