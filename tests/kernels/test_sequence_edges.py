"""Lengths, blocks, windows, lifetimes and chunks around the tiles of the CPU backend, against the reference backend."""

from importlib import import_module
from typing import Any

import pytest
import torch

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.vggt import VGGT
from farspan.kernels.mechanisms.vmoba import VMoBA
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planner import Heads
from tests.support.mechanisms import attend, examples, inputs_of
from tests.support.oracle import assert_close

LENGTHS = [[15, 16, 17], [31, 32, 33], [63, 65], [64, 128], [129], [127, 1], [255], [257]]
"""Tiles of irregular rows and of lifetimes have 128 rows, chunks of recurrences and runs of windows 64."""
HEADS = [Heads(query=8, kv=8), Heads(query=8, kv=1), Heads(query=6, kv=2), Heads(query=7, kv=7), Heads(query=5, kv=1)]
DIMS = [(16, 8), (24, 40), (5, 3)]
BLOCKS = (16, 32, 64, 100)
TILES = ((64, 16), (16, 64), (33, 7))
"""Of queries, and blocks of keys."""
WINDOWS = ((63, 0), (64, 64), (65, 1), (127, 0), (128, 63), (129, 65))
"""And sinks."""
EDGES: list[Mechanism] = [
    *(MoBA(block=block, top_k=2) for block in BLOCKS),
    *(BlockSparse(block=block, density=0.5) for block in BLOCKS),
    *(VMoBA(brick=(block,), rule="top_k", top_k=2) for block in BLOCKS),
    *(SpargeAttention(tile=tile, block=block, similarity=-0.1, mass=0.5) for tile, block in TILES),
    *(VGGT(tile=tile, block=block, mass=0.2, sparsity=0.8) for tile, block in TILES),
    *(Window(window=window, sinks=sinks) for window, sinks in WINDOWS),
    *(NAtS(window=window) for window in (63, 64, 127, 128)),
    Dense(),
    Dense(causal=False),
    MoSA(sparsity=2),
    MoSA(sparsity=2, causal_choice=True),
    Lightning(),
]


@pytest.mark.parametrize("mechanism", EDGES, ids=str)
def test_lengths_around_tiles(mechanism: Mechanism) -> None:
    for number, lengths in enumerate(LENGTHS):
        rows, heads, dims = Rows.packed(lengths, padding=number % 2), HEADS[number % 5], DIMS[number % 3]
        inputs = inputs_of(mechanism, len(rows), heads, dims)
        got, expected = (attend(mechanism, rows, heads, inputs, backend=name) for name in ("cpu", "reference"))
        assert_close(got, expected)


BOUNDS: dict[str, dict[str, Any]] = {
    "masks.selection": {"SUMMED_AT_ONCE": 1000},
    "planning.bounds": {"MAX_CANDIDATES": 7},
    "planning.regions": {"IRREGULAR_TILE": 16},
    "planning.region_attention": {"ROWS_AT_ONCE": 128},
    "planning.gathered_batches": {"ENTRIES_AT_ONCE": 50, "BATCH_ROWS": 100, "BATCH_PAIRS": 1000},
    "planning.lifetime_batches": {"ENTRIES_AT_ONCE": 1000, "BATCH_ROWS": 100, "BATCH_PAIRS": 10_000},
    "lifetimes.gradient": {"TILE_QUERIES": 64, "SCORES_AT_ONCE": 1},
    "mechanisms._tile_selection": {"SCORES_AT_ONCE": 500},
    "mechanisms.block_sparse": {"TILES_AT_ONCE": 3},
    "mechanisms.moba": {"SCORES_AT_ONCE": 500},
    "mechanisms.vmoba": {"SCORES_AT_ONCE": 500},
    "cpu.linear_attention": {"BLOCK": 64},
}
"""What exists at the same time, which tests of small tensors never fill."""


@pytest.mark.parametrize("mechanism", [*examples(), Window(window=65)], ids=str)
def test_results_do_not_depend_on_what_is_done_at_once(mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, heads = Rows.packed([130, 1, 190], padding=3), Heads(query=8, kv=2)
    for rows in (packed, packed.take(torch.randperm(len(packed), generator=torch.Generator().manual_seed(0)))):
        inputs = inputs_of(mechanism, len(rows), heads)
        expected = attend(mechanism, rows, heads, inputs, backend="cpu")
        with monkeypatch.context() as patched:
            for name, bounds in BOUNDS.items():
                for bound, size in bounds.items():
                    patched.setattr(import_module(f"farspan.kernels.{name}"), bound, size)
            assert_close(attend(mechanism, rows, heads, inputs, backend="cpu"), expected)
