"""Choices of blocks by Triton kernels, interpreted: the bits of `select_packed` are those of `select`, packed."""

from dataclasses import replace
from random import Random
from threading import Lock

import pytest
import torch
from torch import Tensor

from farspan.kernels.kinds.routed import LocalShard, Routed
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.vggt import VGGT
from farspan.kernels.mechanisms.vmoba import VMoBA
from farspan.kernels.planner import AllReduceSum, Heads, HeadShare, identity
from farspan.kernels.planning import choice_tiles
from farspan.kernels.triton_kernels import block_choice_launch, joint_choice_launch
from farspan.kernels.triton_kernels.block_choice_launch import Shape
from farspan.parallel.comm import Channel
from tests.support import triton_interpreter
from tests.support.mechanisms import normal
from tests.support.sequence_shards import select
from tests.support.simulation import simulate

# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
HEADS = Heads(query=4, kv=2)
WIDTH = 6
"""No power of two."""
ROWS = {
    "packed": Rows.packed([1, 14, 104], padding=9),
    "shuffled": Rows.packed([20, 41], padding=5).take(torch.randperm(66, generator=torch.Generator().manual_seed(0))),
    "padding": Rows.packed([], padding=6),
    "none": Rows.packed([]),
}
MECHANISMS = [
    MoBA(block=3, top_k=3),
    MoBA(block=1, top_k=100),
    VMoBA(brick=(3,), rule="top_k", top_k=4),
    VMoBA(frame=(4, 5), brick=(2, 3, 2), share=0.3),
    VMoBA(brick=(3,), scope="head", rule="top_k", top_k=4),
    VMoBA(frame=(4, 5), brick=(2, 3, 2), scope="head", share=0.3),
    SpargeAttention(tile=8, block=3, similarity=-0.1, mass=0.6),
    SpargeAttention(tile=16, block=6, similarity=-1.0, top=0.3, sink=True, causal=False),
    SpargeAttention(tile=5, block=3, similarity=0.25, mass=0.3, diagonal=True),
    VGGT(frame=11, special=2, mass=0.5, sparsity=0.7, tile=8, block=3),
    VGGT(mass=0.2, sparsity=0.8, tile=16, block=4),
]
CHOOSERS = [MECHANISMS[0], MECHANISMS[3], MECHANISMS[5], MECHANISMS[6], MECHANISMS[9]]
"""One of each mechanism and scope."""


@pytest.fixture(scope="module", autouse=True)
def _bfloat16() -> None:
    triton_interpreter.patch()


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a program of any size."""
    monkeypatch.setattr(joint_choice_launch, "QUERIES", 64)


def shard(
    mechanism: Routed, rows: Rows, global_rows: Rows, all_reduce_sum: AllReduceSum = identity, heads: Heads = HEADS
) -> LocalShard:
    return LocalShard(
        mechanism=mechanism, rows=rows, key_rows=rows, global_rows=global_rows, share=HeadShare.all(heads),
        backend="triton", all_reduce_sum=all_reduce_sum,
    )  # fmt: skip


def check(mechanism: Routed, q: Tensor, k: Tensor, local_shard: LocalShard) -> None:
    got = mechanism.select_packed(q, k, local_shard)
    expected = PackedSelection.pack(mechanism.select(q, k, local_shard), q.device)
    # Where all is padding, the host may have no lists at all.
    assert torch.equal(got.bits[: len(expected.bits)], expected.bits)
    assert not got.bits[len(expected.bits) :].any()
    assert torch.equal(got.query_block, expected.query_block)
    assert torch.equal(got.selected_blocks(), expected.as_lists.selected_blocks())
    assert expected.most <= got.most <= max(local_shard.key_blocks.first.diff().tolist(), default=0)


def inputs(rows: Rows, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    q, k = normal((len(rows), HEADS.query, WIDTH), (len(rows), HEADS.kv, WIDTH), seed=seed, dtype=dtype)
    return q, k


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_bits_are_those_of_the_host(mechanism: Routed) -> None:
    rows = ROWS["packed"]
    q, k = inputs(rows, torch.bfloat16)
    check(mechanism, q, k, shard(mechanism, rows, rows))


def test_what_was_planned_serves_the_next_layer() -> None:
    rows, mechanism = ROWS["shuffled"], MECHANISMS[0]
    local_shard = shard(mechanism, rows, rows)
    for seed in range(2):
        check(mechanism, *inputs(rows, torch.bfloat16, seed), local_shard)


def test_the_last_queries_choose_among_the_keys_of_all() -> None:
    rows, mechanism = Rows.packed([29, 12]), MoBA(block=3, top_k=3)
    last = torch.tensor([27, 28, 40])
    q, k = inputs(rows, torch.float32)
    check(mechanism, q[last], k, replace(shard(mechanism, rows.take(last), rows), key_rows=rows))


@pytest.mark.parametrize("rows", ["shuffled", "padding", "none"])
@pytest.mark.parametrize("mechanism", CHOOSERS, ids=str)
def test_rows_in_any_order_ties_and_no_rows(mechanism: Routed, rows: str) -> None:
    """Few different scores, 0 and -0 among them."""
    q, k = inputs(ROWS[rows], torch.float32)
    q = q.sign() * (q.abs() > 1)
    k = k.sign() * (ROWS[rows].position % 36 < 18)[:, None, None]
    check(mechanism, -q, k, shard(mechanism, ROWS[rows], ROWS[rows]))


@pytest.mark.parametrize(
    "mechanism",
    [
        VMoBA(brick=(3,), share=0.25),
        VMoBA(brick=(3,), share=0.25, scope="head"),
        SpargeAttention(tile=8, block=3, similarity=-1.0, mass=0.5, causal=False),
    ],
    ids=str,
)
def test_sums_that_reach_a_share_exactly(mechanism: Routed) -> None:
    """8 blocks with scores of 0 and -0, which are equal: 2 are a quarter of the weight, and 4 are half of it."""
    rows = Rows.packed([24])
    q, k = inputs(rows, torch.float32)
    check(mechanism, q * 1e-30, k * 1e-30, shard(mechanism, rows, rows))


def test_a_mean_cosine_that_equals_the_threshold_does_not_exceed_it() -> None:
    """All rows of a block are the same: no block and no tile is similar, and all that is visible is selected."""
    rows, mechanism = Rows.packed([24]), SpargeAttention(tile=6, block=3, similarity=1.0, mass=0.3)
    q, k = torch.zeros(24, HEADS.query, WIDTH), torch.zeros(24, HEADS.kv, WIDTH)
    q[..., 0] = 1
    # Blocks of both signs by turns, so that nothing is subtracted.
    k[..., 0] = (1 - 2 * (torch.arange(24) // 3 % 2))[:, None]
    check(mechanism, q, k, shard(mechanism, rows, rows))


def test_no_more_blocks_are_chosen_than_others_have_room_for() -> None:
    """Whatever the scores are: here most blocks are needed for the share."""
    rows, mechanism = Rows.packed([41]), VMoBA(brick=(3,), share=0.9)
    q, k = inputs(rows, torch.float32)
    choice = replace(mechanism.choice(shard(mechanism, rows, rows), q.device), most=2)
    assert int(choice.choose(q, choice.key_means(k)).as_lists.offsets.diff().max()) == 2


@pytest.mark.parametrize("mechanism", CHOOSERS, ids=str)
def test_rows_of_one_rank_of_several(mechanism: Routed) -> None:
    """Ranks take turns, as the interpreter serves one thread; they meet in sums only. The last one has padding only."""
    rows = Rows.packed([3, 57], padding=4)
    q, k = inputs(rows, torch.bfloat16)
    parts = [torch.arange(0, 30), torch.arange(30, 61).flip(0), torch.arange(61, 64)]
    turn, expected, sent = Lock(), PackedSelection.pack(select(mechanism, q, k, rows), q.device), [0] * len(parts)

    def on_rank(channel: Channel) -> PackedSelection:
        def total(x: Tensor) -> Tensor:
            sent[channel.rank] += x.nbytes
            turn.release()
            try:
                return channel.all_reduce(x, kind="choice")
            finally:
                turn.acquire()

        part = parts[channel.rank]
        with turn:
            return mechanism.select_packed(q[part], k[part], shard(mechanism, rows.take(part), rows, total))

    for part, got in zip(parts, simulate(len(parts), on_rank), strict=True):
        real = got.query_block >= 0
        # [rows, heads, words]
        assert torch.equal(got.bits[got.query_block[real]], expected.bits[expected.query_block[part][real]])
    assert set(sent) == {mechanism.all_reduce_bytes(rows, HEADS, q.shape[2])}


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 blocks; documents of up to 32 are still chosen among at once."""
    monkeypatch.setattr(choice_tiles, "MAX_BLOCKS", 32)
    monkeypatch.setattr(block_choice_launch, "PROGRAMS", 1)
    # As many queries as possible: the interpreter takes as long for a tile of any size.
    monkeypatch.setattr(block_choice_launch, "shape_for", lambda blocks, _: Shape(min(blocks, 64), 128, 1))


@pytest.mark.parametrize(
    ("mechanism", "ties"),
    [
        (MoBA(block=1, top_k=2), True),
        (VMoBA(brick=(1,), share=0.3), False),
        (SpargeAttention(tile=8, block=1, similarity=-1.0, top=0.6, sink=True, causal=False), True),
        (VGGT(frame=11, special=2, mass=0.5, sparsity=0.7, tile=16, block=1), True),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_small_chunks")
def test_chunks_of_blocks_choose_as_all_at_once(mechanism: Routed, ties: bool) -> None:
    """Three chunks, the last of one block; two tiles, one after another, besides those of a short document."""
    rows, heads = Rows.packed([9, 120], padding=3), Heads(query=2, kv=1)
    # The last block's own query is among them.
    some = torch.arange(2, len(rows), 3)
    q, k = normal((len(some), 2, 3), (len(some), 1, 3), seed=0, dtype=torch.float32)
    if ties:
        q, k = q.sign() * (q.abs() > 1), k.sign()
    local_shard = shard(mechanism, rows.take(some), rows, heads=heads)
    check(mechanism, q, k, local_shard)
    assert [some.in_chunks for some in local_shard._made["choice", q.device].tiles] == [True, False]
    # The numbers of 2 blocks take little beside the bits of 129.
    packed = mechanism.select_packed(q, k, local_shard)
    assert packed.numbered == isinstance(mechanism, MoBA)
    # Of a third of the rows; these lie in all tiles.
    if packed.num_query_blocks == len(some):
        assert packed.stored.nbytes == mechanism.kept_bytes(heads, rows, tokens=len(some), packed=True)


@pytest.mark.parametrize("seed", [0, 1, 3, 5, 7, 9, 13, 14])
@pytest.mark.usefixtures("_small_chunks")
def test_documents_about_as_long_as_some_chunks(seed: int) -> None:
    """Of 64 blocks each, from a multiple of 32 on, wherever in its word the document begins."""
    pick = Random(seed).choice
    # As long as one or two chunks, of which what lies before the document takes a part.
    before, chunks = pick([0, 1, 31, 32, 33]), pick([1, 1, 2])
    blocks = max(64 * chunks - before % 32 * pick([0, 1]) + pick([-1, 0, 1]), 34)
    top_k, share = pick([1, 2, 2, 63, 64, 65, 1 << 20]), pick([0.02, 0.3, 0.5, 0.98])
    mechanism = (
        MoBA(block=1, top_k=top_k),
        VMoBA(brick=(1,), rule="top_k", top_k=top_k),
        VMoBA(brick=(1,), share=share),
        SpargeAttention(tile=pick([1, 8]), block=1, similarity=-1.0, mass=share, causal=pick([True, False])),
    )[seed % 4]
    rows = Rows.packed([tokens for tokens in (before, blocks, pick([1, 33])) if tokens])
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:24]
    q, k = normal((24, 1, 3), (24, 1, 3), seed=seed, dtype=torch.float32)
    if pick([True, False]):
        q, k = q.sign() * (q.abs() > 1), k.sign()
    local_shard = shard(mechanism, rows.take(some), rows, heads=Heads(query=1, kv=1))
    check(mechanism, q, k, local_shard)
    assert any(tiles.in_chunks for tiles in local_shard._made["choice", q.device].tiles)
