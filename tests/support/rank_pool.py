"""Pools of real gloo ranks for tests: started once, then a test costs milliseconds.

A pool of n processes is one world of n ranks. `run` sends a module-level function to every rank and returns what each
returned. A rank that raises makes `run` raise; a rank that dies or hangs does too, and the pool is started afresh.
"""

import functools
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from farspan.parallel.comm import Channel, Traffic

COLLECTIVE_TIMEOUT_S = 60
GRACE_S = 3
PRELOAD = "tests.support.preload"


@functools.cache
def _axes(width: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return this rank's inner and outer group; all ranks have to call, as each makes all groups."""
    ranks = list(range(dist.get_world_size()))
    rows = [ranks[start : start + width] for start in range(0, len(ranks), width)]
    columns = [ranks[place::width] for place in range(width)]
    inner, outer = (dist.new_subgroups_by_enumeration(axis)[0] for axis in (rows, columns))
    assert inner is not None
    assert outer is not None
    return inner, outer  # pyright: ignore[reportReturnType]


def world_channel(width: int = 1) -> Channel:
    """On a rank: return the channel of all ranks, a grid if `width`, the size of its inner axis, is more than 1."""
    traffic = Traffic()
    group = dist.group.WORLD
    assert group is not None
    if width == 1:
        return Channel(group, traffic)
    inner, outer = (Channel(axis, traffic) for axis in _axes(width))
    return Channel(group, traffic, inner=inner, outer=outer)


class RankError(AssertionError):
    """A rank raised, died or did not answer in time."""


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        # Plain pickle: torch's own way through connections would keep a file open for every tensor.
        connection.send_bytes(answer)
    dist.destroy_process_group()


class RankPool:
    """A world of gloo ranks that serves one function call at a time."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(
        self, function: Callable[..., Any], *arguments: object, timeout_s: float = 120, grace_s: float = GRACE_S
    ) -> list[Any]:
        """Call `function(*arguments)` on every rank and return the results in rank order."""
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                connection.send((function, arguments))
        except OSError as error:
            self.stop()
            raise RankError(f"a rank of {self.world_size} has died since the last call") from error
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        while pending:
            # Once a rank has failed, the others may wait for it for ever; a moment lets them tell their own failures.
            ready = wait(list(pending), timeout=grace_s if failures else timeout_s)
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    succeeded, value = False, "the process died"
                (results if succeeded else failures)[rank] = value
            if not ready:
                failures |= dict.fromkeys(pending.values(), "no answer")
                break
        if failures:
            self.stop()
            report = "\n".join(f"--- rank {rank} of {self.world_size}\n{text}" for rank, text in failures.items())
            raise RankError(report)
        return [results[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOAD])
        store = os.path.join(tempfile.mkdtemp(prefix="farspan-ranks-"), "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
