import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import PADDING, Rows
from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.neighborhood import Neighborhood
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planning.gathered_batches import count_pairs
from farspan.kernels.planning.plan import Plan
from farspan.parallel.layout import LAYOUTS, MIN_CHUNK_TOKENS, Shards
from tests.support.mechanisms import examples


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_tokens_of_ranks(layout: str, expected: list[list[int]]) -> None:
    assert LAYOUTS[layout](8, 2, lambda: torch.ones(8)).tolist() == expected


@pytest.mark.parametrize("tokens", [1, 7, 64, 101])
@pytest.mark.parametrize("degree", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_token_is_on_one_rank_and_unshard_inverts_shard(layout: str, degree: int, tokens: int) -> None:
    shards = Shards.build(Rows.packed([tokens]), layout=layout, degree=degree)
    tokens_of_ranks = shards.index[shards.index >= 0]
    assert tokens_of_ranks.sort().values.tolist() == list(range(tokens))
    assert shards.tokens_local * degree < tokens + 2 * degree
    x = torch.randn(tokens, 3)
    parts = torch.stack([shards.shard(x, rank, fill=torch.nan) for rank in range(degree)])
    assert int(parts.isnan().any(-1).sum()) == shards.tokens_local * degree - tokens
    assert torch.equal(shards.unshard(parts), x)


def test_padding_rows_belong_to_no_document() -> None:
    shards = Shards.build(Rows.packed([5]), layout="contiguous", degree=2)
    assert shards.rows_of(1).document.tolist() == [0, 0, PADDING]


@pytest.mark.parametrize("degree", [2, 8, 64])
def test_zigzag_and_striped_even_out_causal_work(degree: int) -> None:
    """Largest over mean visible area: 2 - 1/P for contiguous, even for the others up to one diagonal."""
    tokens = 64 * 2 * degree
    rows = Rows.packed([tokens])

    def imbalance(layout: str) -> float:
        shards = Shards.build(rows, layout=layout, degree=degree)
        plans = (Plan.build(shards.rows_of(rank), rows, AttentionMask(), heads=1) for rank in range(degree))
        work = [plan.unmasked_pairs for plan in plans]
        assert sum(work) == tokens * (tokens + 1) // 2
        return max(work) * degree / sum(work)

    assert imbalance("contiguous") == pytest.approx(2 - 1 / degree, rel=0.02)
    assert imbalance("zigzag") == 1.0
    assert imbalance("striped") < 1.01


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.layout='zigzg' does not exist.*Did you mean 'zigzag'"):
        Shards.build(Rows.packed([4]), layout="zigzg", degree=2)


def visible_area(mechanism: Mechanism, rows: Rows, index: Tensor) -> float:
    """Count the pairs that the queries of one rank see, by a plan."""
    assert isinstance(mechanism, Masked)
    selection = None
    if isinstance(mechanism, Routed):
        one = Heads(query=1, kv=1)
        routing = mechanism.route(rows, one, torch.zeros(len(rows), 1, 8), torch.zeros(len(rows), 1, 8))
        selection = routing.selection.of_queries(index)
    plan = Plan.build(rows.take(index), rows, mechanism.attention_mask(), heads=1, selection=selection)
    return plan.unmasked_pairs if selection is None else count_pairs(plan, kv_heads=1)


def log_normal_documents(tokens: int) -> list[int]:
    generator, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < tokens:
        drawn = int(torch.empty(1).log_normal_(6.5, 1.3, generator=generator)) + 1
        lengths.append(min(drawn, tokens - sum(lengths)))
    return lengths


IRREGULAR = BlockSparse(block=1024, mask=tuple("1" * (1 + 7 * n % 64) for n in range(64)))
WORKS = {
    "causal documents": (Dense(), log_normal_documents(1 << 16)),
    "a window": (Window(window=1024), [1 << 16]),
    "a window of documents": (Window(window=256), log_normal_documents(1 << 16)),
    "a drawn pattern": (BlockSparse(block=128, density=0.1), [1 << 16]),
    "a given pattern": (IRREGULAR, [1 << 16]),
    "one causal document": (Dense(), [1 << 16]),
}


@pytest.mark.parametrize("degree", [8, 64])
@pytest.mark.parametrize("name", list(WORKS))
def test_balanced_evens_out_unmasked_pairs(name: str, degree: int) -> None:
    """At most 1.05 times the mean on any rank, as plans count; round robin would have 1.5 for some of these."""
    mechanism, lengths = WORKS[name]
    rows = Rows.packed(lengths)
    shards = Shards.build(rows, layout="balanced", degree=degree, work=mechanism.keys_per_query)
    work = [visible_area(mechanism, rows, index) for index in shards.index]
    assert max(work) * degree / sum(work) <= 1.05
    assert (shards.index >= 0).sum() == len(rows)


def test_balanced_assigns_as_few_chunks_as_possible() -> None:
    """Two per rank, as zigzag has them, where these are even already."""
    index = Shards.build(Rows.packed([1 << 14]), layout="balanced", degree=8).index
    assert int((index.diff(dim=1) != 1).sum(dim=1).max()) == 1


def test_balanced_assigns_no_chunk_that_is_too_short() -> None:
    """One token that is all the work cannot be evened out: 8192 tokens are split into 64 chunks of 128, no further."""
    work = torch.zeros(8192, dtype=torch.float64)
    work[1000] = 1
    index = Shards.build(Rows.packed([8192]), layout="balanced", degree=8, work=lambda _: work).index
    chunks = index.view(8, -1, MIN_CHUNK_TOKENS)
    assert (chunks.diff(dim=2) == 1).all()
    assert (chunks[:, :, 0] % MIN_CHUNK_TOKENS == 0).all()
    assert int((index.diff(dim=1) != 1).sum(dim=1).max()) > 3


@pytest.mark.parametrize(
    "mechanism", [x for x in examples(Masked) if x.static_mask and not isinstance(x, Neighborhood)], ids=str
)
def test_visible_keys_are_those_of_the_mask(mechanism: Masked) -> None:
    rows = Rows.packed([1, 130, 3, 77], padding=5)
    attention_mask = mechanism.attention_mask()
    heads = len(attention_mask.window) if isinstance(attention_mask.window, tuple) else 1
    mask = Plan.build(rows, rows, attention_mask, heads=heads).mask()
    assert torch.equal(mechanism.keys_per_query(rows), mask.double().sum(dim=2).mean(dim=0))


def test_visible_keys_of_grids_blocks_and_routers() -> None:
    grid = Neighborhood(grid=(3, 5, 8), window=(2, 3, 3), stride=(1, 1, 2), dilation=(1, 1, 2))
    rows = Rows.packed([120, 240])
    mask = Plan.build(rows, rows, grid.attention_mask(), heads=1).mask()[0]
    assert torch.equal(grid.keys_per_query(rows), mask.double().sum(dim=1))
    for mechanism in (
        MoBA(block=32, top_k=3),
        BlockSparse(block=32, density=0.4),
        BlockSparse(block=32, mask=("1", "11", "101", "0101")),
    ):
        rows, one = Rows.packed([1, 128, 96], padding=3), Heads(query=1, kv=1)
        q = torch.randn(len(rows), 1, 8, generator=torch.Generator().manual_seed(0))
        selection = mechanism.route(rows, one, q, q).selection
        plan = Plan.build(rows, rows, mechanism.attention_mask(), heads=1, selection=selection)
        assert torch.equal(mechanism.keys_per_query(rows), plan.mask()[0].double().sum(dim=1)), mechanism
    assert Lightning().keys_per_query(rows).sum() == 225
    # Of 128 and 96 tokens 8 and 6 are selected, of one that one: later ones see more, padding nothing.
    keys = MoSA(sparsity=16).keys_per_query(rows)
    assert keys.sum() == pytest.approx(1 + 8 * 9 / 2 + 6 * 7 / 2)
    assert torch.allclose(keys / keys[0], Dense().keys_per_query(rows))
