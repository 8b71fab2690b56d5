"""What every routed mechanism owes: one selection, however rows and heads are sharded, and the bytes that it states."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms import moba
from farspan.kernels.planner import Heads, HeadShare, identity
from farspan.kernels.planning.gathered_batches import count_pairs
from farspan.kernels.planning.plan import Plan
from tests.support.sequence_shards import lists, select, select_sharded

EXAMPLES = [
    pytest.param(example, id=str(example))
    for name in MECHANISMS
    for example in MECHANISMS.get(name).examples()
    if isinstance(example, Routed)
]
ROWS = Rows.packed([130, 1, 75, 40], padding=9)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(ROWS), heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2))
    return q.to(dtype), k.to(dtype)


def by_row(selection: BlockSelection, rows: Tensor) -> dict[tuple[int, int], list[int]]:
    """The blocks of each (query head, row of the sequence), of a selection for the sequence's `rows`."""
    of_units, group = lists(selection), 4 // selection.heads
    return {
        (head, row): of_units[head // group, unit]
        for head in range(4)
        for row, unit in zip(rows.tolist(), selection.unit.tolist(), strict=True)
        if unit >= 0
    }


@pytest.mark.parametrize("mechanism", EXAMPLES)
@pytest.mark.parametrize("sharding", ["striped", "chunks", "shuffled"])
def test_the_selection_does_not_depend_on_the_sharding(mechanism: Routed, sharding: str) -> None:
    q, k = inputs()
    count = len(ROWS)
    parts = {
        "striped": [torch.arange(i, count, 3) for i in range(3)],
        "chunks": [torch.arange(0, 140), torch.arange(140, 246), torch.arange(246, count)],  # the last is padding
        "shuffled": list(torch.randperm(count, generator=torch.Generator().manual_seed(1)).split(100)),
    }[sharding]
    of_all = by_row(select(mechanism, q, k, ROWS), torch.arange(count))
    selections, summed_bytes = select_sharded(mechanism, q, k, ROWS, parts)
    assert summed_bytes == mechanism.all_reduce_bytes(ROWS, Heads(query=4, kv=2), 16)
    together = {}
    for part, selection in zip(parts, selections, strict=True):
        together |= by_row(selection, part)
    assert together == of_all


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_sharded_heads_select_as_all_heads_do(mechanism: Routed) -> None:
    q, k = inputs()
    of_all = by_row(select(mechanism, q, k, ROWS), torch.arange(len(ROWS)))
    for heads in (range(0, 2), range(3, 4)):
        kv = slice(heads.start // 2, heads.start // 2 + 1)
        local_shard = LocalShard(
            mechanism=mechanism,
            rows=ROWS,
            global_rows=ROWS,
            share=HeadShare(all_heads=Heads(query=4, kv=2), head_range=heads),
            all_reduce_sum=identity,
        )
        selection = mechanism.select(q[:, heads.start : heads.stop], k[:, kv], local_shard)
        found, group = lists(selection), len(heads) // selection.heads
        for head in heads:
            for row, unit in enumerate(selection.unit.tolist()):
                if unit >= 0:
                    assert found[(head - heads.start) // group, unit] == of_all[head, row]


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_each_query_chooses_some_visible_block_or_none_is_there(mechanism: Routed) -> None:
    """Blocks of other documents, later ones and empty ones are never on a list."""
    q, k = inputs()
    selection = select(mechanism, q, k, ROWS)
    blocks, visible = mechanism.key_blocks(ROWS).of(ROWS), mechanism.attention_mask().mask(ROWS, ROWS)
    for (_, unit), chosen in lists(selection).items():
        of_unit = visible[selection.unit == unit].any(dim=0)
        assert set(chosen) <= set(blocks[of_unit].tolist())
        assert chosen == sorted(set(chosen))


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_pairs_are_counted(mechanism: Routed) -> None:
    q, k = inputs()
    plan = Plan.build(ROWS, ROWS, mechanism.attention_mask(), heads=4, selection=select(mechanism, q, k, ROWS))
    assert count_pairs(plan, kv_heads=2) == int(plan.mask().sum()) // 4
    assert 0 < mechanism.unmasked_pairs(ROWS, ROWS) <= int(mechanism.attention_mask().mask(ROWS, ROWS).sum())


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_memory_is_bounded_by_parts(mechanism: Routed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is the same where scores are computed for a few queries at a time."""
    q, k = inputs(torch.float32)
    of_all = lists(select(mechanism, q, k, ROWS))
    for module in ("farspan.kernels.mechanisms._pooled_scores", "farspan.kernels.mechanisms.vmoba"):
        monkeypatch.setattr(f"{module}.SCORES_AT_ONCE", 500)
    monkeypatch.setitem(moba.SCORES_AT_ONCE, "cpu", 500)
    monkeypatch.setattr("farspan.kernels.mechanisms.block_sparse.TILES_AT_ONCE", 3)
    assert lists(select(mechanism, q, k, ROWS)) == of_all
