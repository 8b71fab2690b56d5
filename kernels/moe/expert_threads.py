"""Experts shared out to threads on a CPU.

Threads that multiply small matrices together wait for each other at each, on a busy machine for longer than they
compute: for 64 products of 128 rows, two threads took 1.5 times as long as with 32 for each of them (docs/log.md).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

ALONE_ROWS = 1024
"""Rows from which on an expert is worked on by all threads together."""


def for_each_expert(counts: Sequence[int], device: torch.device, work: Callable[[int], None]) -> None:
    """Call `work` once for each expert that has rows; no two may write to the same place."""
    threads, busy = torch.get_num_threads(), [expert for expert, count in enumerate(counts) if count]
    small = [expert for expert in busy if counts[expert] < ALONE_ROWS]
    if threads == 1 or device.type != "cpu" or len(small) < 2:
        small = []
    for expert in busy:
        if not small or counts[expert] >= ALONE_ROWS:
            work(expert)
    if small:
        _in_threads(share_out(small, counts, threads), threads, work)


def share_out(experts: Sequence[int], counts: Sequence[int], shares: int) -> list[list[int]]:
    """Return lists of experts with about as many rows each: the largest goes first, to who has fewest."""
    lists: list[list[int]] = [[] for _ in range(shares)]
    rows = [0] * shares
    for expert in sorted(experts, key=lambda expert: -counts[expert]):
        least = rows.index(min(rows))
        lists[least].append(expert)
        rows[least] += counts[expert]
    return lists


def _in_threads(lists: list[list[int]], threads: int, work: Callable[[int], None]) -> None:
    def run(experts: list[int]) -> None:
        # Both are a thread's own: torch's number of threads, but for those that begin meanwhile, and no gradients.
        torch.set_num_threads(1)
        with torch.no_grad():
            for expert in experts:
                work(expert)

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, lists))
    finally:
        torch.set_num_threads(threads)
