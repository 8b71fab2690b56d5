"""Queries that travel to the keys they chose: bytes against a ring, and which queries are dispatched."""

import itertools

import pytest
import torch
from torch.nn.functional import pad

from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.vggt import VGGT
from farspan.parallel.comm import Unconnected
from farspan.parallel.context_parallel.query_dispatch import BlockOwners
from farspan.parallel.context_parallel.strategy import STRATEGIES, Sizes
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.oracle import selected_mask, visible_mask

TOKENS, BLOCK = 1 << 14, 128


def sent(strategy: str, degree: int, heads: Heads, top_k: int) -> int:
    """Return the bytes that all ranks send in a bfloat16 layer with heads of 64, forward."""
    mechanism, rows = MoBA(block=BLOCK, top_k=top_k), Rows.packed([TOKENS])
    shards = Shards.build(rows, layout="contiguous", degree=degree)
    routing = mechanism.sample_routing(rows, heads)
    total = 0
    for rank in range(0, degree, max(degree // 4, 1)):
        channel = Unconnected(rank, degree)
        planned = STRATEGIES.get(strategy)(channel).prepare(mechanism, shards, heads, backend="cpu")
        total += planned.volume(Sizes.of(torch.bfloat16, 64, 64), lambda: routing).forward
    return total


@pytest.mark.parametrize(
    ("degree", "heads", "top_k", "ships"),
    [
        # Up to K - 1 other ranks per query: K = 3 moves 2 x (12 + 4 + 128 + 260) bytes per head, the ring 31 x 256.
        (32, Heads(query=4, kv=4), 3, True),
        # Of 4 query heads to a KV head each moves for itself, still less than 31 chunks.
        (32, Heads(query=4, kv=1), 3, True),
        # At 4 ranks the ring sends 3 x 256 for 4 heads, and queries 4 times as much as above.
        (4, Heads(query=4, kv=1), 3, False),
        (8, Heads(query=4, kv=1), 8, False),
    ],
)
def test_ship_sends_less_than_a_ring_where_the_formula_says_so(
    degree: int, heads: Heads, top_k: int, ships: bool
) -> None:
    """Published, for results as wide as queries: when degree - 1 > (Hq / Hk) (K - 1).

    In farspan they return in float32: 404 bytes a query where a key and a value have 256.
    """
    condition = degree - 1 > (heads.query / heads.kv) * (top_k - 1) * 404 / 256
    assert condition == ships
    assert (sent("ship", degree, heads, top_k) < sent("ring", degree, heads, top_k)) == ships


MECHANISMS = [
    MoBA(block=6, top_k=3),
    BlockSparse(block=10, density=0.4),
    VGGT(frame=12, special=2, mass=0.3, sparsity=0.8, tile=9, block=7),
]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_a_query_goes_to_ranks_with_visible_chosen_keys_only(mechanism: Routed, layout: str) -> None:
    rows, heads, degree = Rows.packed([50, 1, 33], padding=11), Heads(query=4, kv=2), 5
    shards = Shards.build(rows, layout=layout, degree=degree)
    chosen = mechanism.sample_routing(rows, heads).selection
    sees = visible_mask(rows, rows, mechanism.attention_mask(), heads.query) & selected_mask(chosen, rows, heads.query)
    index = shards.index.flatten()
    owner = torch.full((len(rows),), -1)
    owner[index[index >= 0]] = torch.arange(degree).repeat_interleave(shards.tokens_local)[index >= 0]
    blocks, dispatched = mechanism.key_blocks(rows), 0
    block_of_row = blocks.of(rows)
    owners = BlockOwners.of(mechanism.attention_mask(), blocks, shards, heads.query)
    for rank, other in itertools.product(range(degree), range(degree)):
        selection = chosen.of_queries(shards.index[rank])
        # A device sorts as many choices as there may be: those of no block are none.
        pair, block = (
            pad(x, (3, 5), value=v) for x, v in zip(selection.choices(heads.query), (7, blocks.count), strict=True)
        )
        choices = owners.choices(rank, pair, block)
        plan = choices.plan(choices.per_rank.tolist())
        first = sum(plan.queries_per_rank[:other])
        row, head = (x.split(plan.queries_per_rank)[other] for x in (plan.row, plan.head))
        sent = torch.zeros(heads.query, len(rows), dtype=torch.bool)
        sent[head, shards.index[rank][row]] = True
        assert len(row) == sent.sum(), "a row of a head goes to a rank once"
        wanted = sees[:, :, owner == other].any(dim=2) & (owner == rank)
        assert torch.equal(sent, wanted & (rank != other))
        lists = plan.block.split(plan.blocks_per_rank)[other].split(plan.num_blocks[first : first + len(row)].tolist())
        for of_row, of_head, numbers in zip(row, head, lists, strict=True):
            keys = sees[of_head, shards.index[rank][of_row]] & (owner == other)
            assert torch.equal(numbers, block_of_row[keys].unique())
        dispatched += len(row)
    assert dispatched > 0
