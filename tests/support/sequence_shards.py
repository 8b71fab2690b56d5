"""What a routed mechanism chooses for a whole sequence, or for the rows of one holder of several."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import AllReduceSum, Heads, LocalShard, Routed, identity


def select(
    mechanism: Routed, q: Tensor, k: Tensor, rows: Rows, global_rows: Rows | None = None, total: AllReduceSum = identity
) -> BlockSelection:
    """Return the choice for q `[T, Hq, D]` of the local rows; `global_rows` defaults to `rows`."""
    local_shard = LocalShard(
        mechanism=mechanism,
        rows=rows,
        global_rows=rows if global_rows is None else global_rows,
        heads=range(q.shape[1]),
        all_heads=Heads(query=q.shape[1], kv=k.shape[1]),
        total=total,
    )
    return mechanism.select(q, k, local_shard)


def lists(selection: BlockSelection) -> dict[tuple[int, int], list[int]]:
    """Return the blocks of each (head, unit)."""
    offsets, chosen = selection.offsets.tolist(), selection.key_blocks.tolist()
    return {
        (head, unit): chosen[
            offsets[head * selection.num_query_blocks + unit] : offsets[head * selection.num_query_blocks + unit + 1]
        ]
        for head in range(selection.heads)
        for unit in set(selection.query_block.tolist()) - {-1}
    }


def select_spread(
    mechanism: Routed, q: Tensor, k: Tensor, rows: Rows, parts: Sequence[Tensor]
) -> tuple[list[BlockSelection], int]:
    """Return what holders of the rows `parts` choose, in lockstep, and the bytes of what they sum."""
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
    assert len(set(summed_bytes)) == 1, "holders must make the same calls"
    return selections, summed_bytes[0]
