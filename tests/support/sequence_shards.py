"""Selections of routed mechanisms: for a full sequence, for the rows of one rank, or on several ranks at once."""

import threading
from collections.abc import Callable, Sequence
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
    """The selection for q `[T, Hq, D]` of the local rows; `global_rows` defaults to `rows`."""
    local_shard = LocalShard(
        mechanism=mechanism,
        rows=rows,
        global_rows=rows if global_rows is None else global_rows,
        share=HeadShare.all(Heads(query=q.shape[1], kv=k.shape[1])),
        all_reduce_sum=all_reduce_sum,
    )
    return mechanism.select(q, k, local_shard)


def lists(selection: BlockSelection) -> dict[tuple[int, int], list[int]]:
    """The key blocks of each (head group, query block)."""
    of_list = [x.tolist() for x in selection.key_blocks.tensor_split(selection.offsets[1:-1])]
    return {
        (head, block): of_list[head * selection.num_query_blocks + block]
        for head in range(selection.heads)
        for block in set(selection.query_block.tolist()) - {-1}
    }


def check_by_document(
    mechanism: Routed,
    lengths: Sequence[int],
    heads: tuple[int, int],
    visible: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Compare the mask of a selection with `visible` of q and k `[length, D]`, one head and document at a time."""
    rows, generator = Rows.packed(lengths, padding=3), torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(rows), n, 16, generator=generator, dtype=torch.float64) for n in heads)
    got, first = select(mechanism, q, k, rows).mask(rows), 0
    for length in lengths:
        document = slice(first, first + length)
        for head in range(heads[0]):
            expected = visible(q[document, head], k[document, head // (heads[0] // heads[1])])
            assert torch.equal(got[head, document, document], expected)
        assert not got[:, document, :first].any()
        first += length


def select_on_ranks(
    mechanism: Routed, q: Tensor, k: Tensor, rows: Rows, parts: Sequence[Tensor]
) -> tuple[list[BlockSelection], int]:
    """The selections of ranks with the rows `parts`, one thread each, and the bytes that they sum."""
    barrier, shared = threading.Barrier(len(parts)), {}
    summed_bytes = [0] * len(parts)

    def rank(number: int) -> BlockSelection:
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
        selections = list(pool.map(rank, range(len(parts))))
    assert len(set(summed_bytes)) == 1, "ranks must make the same calls"
    return selections, summed_bytes[0]
