"""Lists of gathered rows, and attention over them, interpreted; `test_interpreted.py` runs this file.

interpreted_attention.py compares the mechanisms that select by rows, head sizes and dtypes with the formula.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection, num_words
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockPartition
from farspan.kernels.planning.plan import Plan
from farspan.kernels.triton_kernels import gathered_launch
from farspan.kernels.triton_kernels.attention_launch import Shape, Shapes
from farspan.kernels.triton_kernels.gathered_launch import RowLists, chunk_rows, row_lists_of
from farspan.kernels.triton_kernels.row_tables import selects_by_row
from tests.support import attention_cases as contract
from tests.support import oracle
from tests.support.attention_cases import Tensors

HEADS, KV_HEADS = 4, 2
RAGGED = Rows.packed([1, 26, 3, 23], padding=5)
SHUFFLED = Rows.packed([33, 20], padding=3).take(torch.randperm(56, generator=torch.Generator().manual_seed(0)))
SHAPES = Shapes(forward=Shape(32, 16, 4, 1), dq=Shape(16, 16, 4, 1), dkv=Shape(32, 32, 4, 1))

# Triton's interpreter takes the only element of an array for a loop's bound, which NumPy 2.4 will refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_launch, "shapes_for", lambda *_: SHAPES)
    # Two or three chunks; the interpreter takes some 10 ms for a tile, whatever its size.
    monkeypatch.setattr(gathered_launch, "SHORTEST_CHUNK", 25)


def random_selection(
    rows: Rows, *, block: int = 16, lists: int = HEADS, share: float = 0.4, together: int = 1
) -> PackedSelection:
    """Blocks of any document, visible or not; `together` neighboring rows select the same."""
    generator = torch.Generator().manual_seed(2)
    blocks, count = BlockPartition.blocks(rows, block), -(-len(rows) // together)
    selects = torch.rand(count, lists, blocks.count, generator=generator) < share
    bits = np.zeros((count, lists, num_words(blocks.count)), dtype=np.uint32)
    for number in range(blocks.count):
        bits[..., number // 32] |= selects[..., number].numpy().astype(np.uint32) << np.uint32(number % 32)
    query_block = (torch.arange(len(rows)) // together).masked_fill(rows.document < 0, -1)
    # Rows without a query block are not only those of padding: queries that another rank sent may lack one.
    query_block[5] = -1
    most = int(selects.sum(dim=2).max()) if count else 0
    return PackedSelection(
        bits=torch.from_numpy(bits.view(np.int32)), query_block=query_block, blocks=blocks, most=most
    )


def plan_of(rows: Rows, keys: Rows, attention_mask: AttentionMask, selection: PackedSelection) -> Plan:
    plan = Plan.build(rows, keys, attention_mask, heads=HEADS, selection=selection)
    assert selects_by_row(plan)
    return plan


def members(lists: RowLists) -> list[list[int]]:
    """The rows of heads on each list: of each block, of each KV head, of each chunk."""
    return [lists.members[start:stop].tolist() for start, stop in pairwise(lists.starts.tolist())]


def expected_members(selection: PackedSelection, chunk: int) -> list[list[int]]:
    rows, share = len(selection.query_block), HEADS // KV_HEADS
    words = selection.bits.numpy().view(np.uint32)

    def selects(row: int, head: int, block: int) -> bool:
        query_block, group = int(selection.query_block[row]), head * selection.heads // HEADS
        return query_block >= 0 and bool(words[query_block, group, block // 32] >> np.uint32(block % 32) & 1)

    return [
        [
            row * HEADS + head
            for row in range(first, min(first + chunk, rows))
            for head in range(kv_head * share, (kv_head + 1) * share)
            if selects(row, head, block)
        ]
        for block in range(selection.blocks.count)
        for kv_head in range(KV_HEADS)
        for first in range(0, rows, chunk)
    ]


@pytest.mark.parametrize(
    ("chunk", "block", "lists", "together"), [(16, 2, 4, 1), (50, 1, 2, 1), (82, 16, 4, 3), (21, 3, 2, 2)]
)
def test_lists_are_those_of_the_bits(
    chunk: int, block: int, lists: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three words, chunks of part of a step and of several, rows that select together; ascending."""
    monkeypatch.setattr(gathered_launch, "chunk_rows", lambda *_: chunk)
    selection = random_selection(RAGGED, block=block, lists=lists, together=together)
    plan = plan_of(RAGGED, RAGGED, AttentionMask(), selection)
    found = row_lists_of(selection, plan, kv_heads=KV_HEADS)
    assert members(found) == expected_members(selection, chunk)


def test_lists_of_all_blocks_fill_the_memory_they_have() -> None:
    """The bound on their length is reached, and nothing is written beyond it."""
    rows = Rows.packed([70])
    selection = random_selection(rows, block=2, share=1.0)
    selection.query_block[5] = 5
    found = row_lists_of(selection, plan_of(rows, rows, AttentionMask(), selection), kv_heads=KV_HEADS)
    assert len(found.members) == int(found.starts[-1]) == 70 * HEADS * 35
    assert members(found) == expected_members(selection, found.chunk_rows)


def test_selections_under_one_mask_keep_their_tables_apart() -> None:
    """Other query blocks, other KV heads; tiles of other sizes, and chunks of selections of other lengths."""
    first, second = (random_selection(RAGGED, together=together) for together in (1, 3))
    plan = plan_of(RAGGED, RAGGED, AttentionMask(), first)
    for selection in (first, second, first):
        found = row_lists_of(selection, plan, kv_heads=KV_HEADS)
        assert members(found) == expected_members(selection, found.chunk_rows)
    assert 2 * len(row_lists_of(first, plan, kv_heads=1).starts[1:]) == len(found.starts[1:])
    tables = [
        gathered_launch._tables(plan, first.blocks, size, chunk, torch.device("cpu"))
        for size, chunk in ((16, 25), (8, 25), (8, 50))
    ]
    assert [len(x.visits) for x in tables] == [3, 3, 2]
    assert len(tables[0].tiles) < len(tables[1].tiles)


@pytest.mark.parametrize("lengths", [[], [0]])
def test_lists_of_no_rows(lengths: list[int]) -> None:
    rows = Rows.packed(lengths)
    selection = PackedSelection(
        bits=torch.zeros(0, HEADS, 1, dtype=torch.int32),
        query_block=torch.zeros(0, dtype=torch.int64),
        blocks=BlockPartition.blocks(rows, 16),
        most=0,
    )
    plan = Plan.build(rows, rows, AttentionMask(), heads=HEADS, selection=selection)
    assert members(row_lists_of(selection, plan, kv_heads=KV_HEADS)) == []


def test_more_rows_of_heads_than_numbers_are_refused() -> None:
    selection = random_selection(Rows.packed([8]))
    with pytest.raises(ValueError, match="8 rows of 300000000 heads are too many to number"):
        gathered_launch._row_lists(selection, selection.query_block.int(), 300_000_000, KV_HEADS)


def test_chunks_fill_tiles_and_give_enough_programs() -> None:
    """At 131,072 tokens, 32:8 heads, on one GPU and on one of eight; few rows in all; a selection of nothing."""
    assert chunk_rows(131_072, 32, 8, 256, 8) == chunk_rows(131_072, 32, 8, 1024, 32) == 2048
    assert chunk_rows(16_384, 32, 8, 256, 8) == 256
    assert chunk_rows(131_072, 32, 8, 128, 32) == 256
    assert chunk_rows(100, 4, 2, 7, 2) == chunk_rows(0, 4, 2, 0, 0) == gathered_launch.SHORTEST_CHUNK


WINDOWS = AttentionMask(window=(3, 40, 3, 9), sinks=2)
CASES = {
    "parts that interleave": (RAGGED, AttentionMask(), {}, lambda n: [torch.arange(0, n, 2), torch.arange(1, n, 2)]),
    "windows of heads, lists of KV heads": (SHUFFLED, WINDOWS, {"lists": KV_HEADS}, lambda n: [torch.arange(n)]),
    "a short part, sinks alone": (Rows.packed([52]), WINDOWS, {}, lambda n: torch.arange(n).split([50, 2])),
    "neighborhood": (Rows.packed([40]), contract.GRID, {"lists": KV_HEADS}, lambda n: [torch.arange(n)]),
    "rows that select together": (
        RAGGED, AttentionMask(causal=False), {"together": 3, "block": 7}, lambda n: torch.arange(n).split([30, n - 30])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts of the keys, of few rows in a chunk, with one ordering for both passes."""
    rows, attention_mask, options, parts_of = CASES[name]
    made: list[RowLists] = []
    make = gathered_launch._row_lists
    monkeypatch.setattr(gathered_launch, "_row_lists", lambda *given: made.append(make(*given)) or made[-1])
    selection = random_selection(rows, **options)
    parts = list(parts_of(len(rows)))
    plans = [plan_of(rows, rows.take(part), attention_mask, selection) for part in parts]
    tensors = Tensors.random(len(rows), len(rows), (HEADS, KV_HEADS), dtype=torch.float32)
    mask = contract.mask_of(rows, rows, attention_mask, HEADS, selection.as_lists)
    got = contract.run_parts(tensors, parts, plans, "triton")
    oracle.assert_close(got, contract.expect(tensors, mask), oracle.RELATIVE_TOLERANCE[torch.float32])
    assert len(made) == 1


def test_threads_get_the_lists_of_their_own_selections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those kept of one selection may be dropped for another thread's at any time."""

    def slow(selection: PackedSelection, *_: object) -> object:
        time.sleep(1e-6)
        return selection.bits

    monkeypatch.setattr(gathered_launch, "_row_lists", slow)
    selections = [random_selection(RAGGED) for _ in range(4)]
    plan = plan_of(RAGGED, RAGGED, AttentionMask(), selections[0])

    def check(selection: PackedSelection) -> None:
        for _ in range(200):
            assert row_lists_of(selection, plan, kv_heads=KV_HEADS) is selection.bits

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, selections))


def test_lists_of_one_selection_at_a_time_are_kept() -> None:
    """Bits wait for the backward pass; lists, which may be many times as large, are made again."""
    first, second = (random_selection(RAGGED) for _ in range(2))
    plan = plan_of(RAGGED, RAGGED, AttentionMask(), first)
    lists = row_lists_of(first, plan, kv_heads=KV_HEADS)
    assert row_lists_of(first, plan, kv_heads=KV_HEADS) is lists
    row_lists_of(second, plan, kv_heads=KV_HEADS)
    assert list(gathered_launch._LATEST) == [second]
    again = row_lists_of(first, plan, kv_heads=KV_HEADS)
    assert again is not lists
    assert torch.equal(again.starts, lists.starts)
    del first, plan
    assert not gathered_launch._LATEST


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without numbers: asking for one is an error. A layer takes few operations, at any length.

    What rows and mask alone decide is made in the first layer, and serves all.
    """
    launched: list[str] = []
    monkeypatch.setattr(gathered_launch, "launch", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    monkeypatch.setattr(gathered_launch, "statistics", lambda dout, out, lse, _: (lse, lse))
    device, rows = torch.device("meta"), Rows.packed([3000, 1, 1095])
    q, k, v, dout = (torch.empty(len(rows), n, 16, device=device) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    masked = Plan.build(rows, rows, AttentionMask(), heads=HEADS)
    blocks, query_block, counts = BlockPartition.blocks(rows, 256), torch.arange(len(rows)), []
    for _ in range(2):
        bits = torch.empty(len(rows), HEADS, 1, dtype=torch.int32, device=device)
        plan = masked.with_selection(PackedSelection(bits=bits, query_block=query_block, blocks=blocks, most=3))
        with Operations() as forward:
            out, lse = gathered_launch.forward(q, k, v, plan)
        with Operations() as backward:
            gathered_launch.backward(dout, q, k, v, out, lse, plan)
        counts.append((forward.count, backward.count))
    assert launched == 2 * [
        "histogram_kernel", "fill_kernel", "gathered_forward_kernel", "gathered_dkv_kernel", "gathered_dq_kernel"
    ]  # fmt: skip
    # out, lse and its scaling; room for lists, counts and their sum. Gradients of q, k and v.
    assert counts[1] == (6, 3)
    assert counts[0] <= (20, 10)


class Operations(TorchDispatchMode):
    """Counts operations that work on a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "meta" and not func.is_view:
            self.count += 1
        return result
