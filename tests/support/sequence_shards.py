"""Selections of routed mechanisms: for a full sequence, for the rows of one rank, or on several ranks at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.planner import AllReduceSum, Heads, HeadShare, identity
from farspan.parallel.comm import Channel
from tests.support.mechanisms import normal
from tests.support.simulation import simulate


def select(
    mechanism: Routed,
    q: Tensor,
    k: Tensor,
    rows: Rows,
    *,
    global_rows: Rows | None = None,
    share: HeadShare | None = None,
    all_reduce_sum: AllReduceSum = identity,
) -> BlockSelection:
    """The selection for q `[T, Hq, D]` of the local rows; by default these are the global rows, and heads are all."""
    local_shard = LocalShard(
        mechanism=mechanism,
        rows=rows,
        key_rows=rows,
        global_rows=rows if global_rows is None else global_rows,
        share=share or HeadShare.all(Heads(query=q.shape[1], kv=k.shape[1])),
        backend="reference",
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
    rows = Rows.packed(lengths, padding=3)
    q, k = normal(*((len(rows), n, 16) for n in heads))
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
    summed_bytes = [0] * len(parts)

    def on_rank(channel: Channel) -> BlockSelection:
        def total(x: Tensor) -> Tensor:
            summed_bytes[channel.rank] += x.nbytes
            return channel.all_reduce(x, kind="choice")

        part = parts[channel.rank]
        return select(mechanism, q[part], k[part], rows.take(part), global_rows=rows, all_reduce_sum=total)

    selections = simulate(len(parts), on_rank)
    assert len(set(summed_bytes)) == 1, "ranks must make the same calls"
    return selections, summed_bytes[0]
