"""The selection of a routed mechanism for a full sequence, or for the rows of one owner of several."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planner import AllReduceSum, Heads, HeadShare, identity


def select(
    mechanism: Routed,
    q: Tensor,
    k: Tensor,
    rows: Rows,
    global_rows: Rows | None = None,
    all_reduce_sum: AllReduceSum = identity,
) -> BlockSelection:
    """Return the selection for q `[T, Hq, D]` of the local rows; `global_rows` defaults to `rows`."""
    local_shard = LocalShard(
        mechanism=mechanism,
        rows=rows,
        global_rows=rows if global_rows is None else global_rows,
        share=HeadShare.all(Heads(query=q.shape[1], kv=k.shape[1])),
        all_reduce_sum=all_reduce_sum,
    )
    return mechanism.select(q, k, local_shard)


def lists(selection: BlockSelection) -> dict[tuple[int, int], list[int]]:
    """Return the blocks of each (head, unit)."""
    offsets, chosen = selection.offsets.tolist(), selection.chosen.tolist()
    return {
        (head, unit): chosen[
            offsets[head * selection.num_units + unit] : offsets[head * selection.num_units + unit + 1]
        ]
        for head in range(selection.heads)
        for unit in set(selection.unit.tolist()) - {-1}
    }


def select_sharded(
    mechanism: Routed, q: Tensor, k: Tensor, rows: Rows, parts: Sequence[Tensor]
) -> tuple[list[BlockSelection], int]:
    """Return what the owners of the rows `parts` select, in lockstep, and the bytes of what they sum."""
    barrier, shared = threading.Barrier(len(parts)), {}
    summed_bytes = [0] * len(parts)

    def hold(number: int) -> BlockSelection:
        def total(x: Tensor) -> Tensor:
            shared[number] = x.clone()
            summed_bytes[number] += x.nbytes
            barrier.wait()
            result = torch.stack([shared[other] for other in range(len(parts))]).sum(dim=0)
            barrier.wait()
            return result.to(x.dtype)

        try:
            part = parts[number]
            return select(mechanism, q[part], k[part], rows.take(part), rows, total)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        selections = list(pool.map(hold, range(len(parts))))
    assert len(set(summed_bytes)) == 1, "owners must make the same calls"
    return selections, summed_bytes[0]
