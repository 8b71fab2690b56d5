"""SpargeAttn's block map, written a second time, document by document, as the published code computes it."""

import math

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.sparge import SpargeAttention
from tests.support.mechanisms import normal
from tests.support.sequence_shards import lists, select

LENGTHS = [2, 50, 33, 128]


def chunks(x: Tensor, size: int) -> list[Tensor]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def similar(x: Tensor, threshold: float) -> bool:
    """Whether the mean cosine of all pairs of rows exceeds the threshold."""
    lengths = [math.sqrt(float(row @ row)) for row in x]
    cosines = [float(a @ b) / (m * n) for a, m in zip(x, lengths, strict=True) for b, n in zip(x, lengths, strict=True)]
    return sum(cosines) / len(cosines) > threshold


def block_map(q: Tensor, k: Tensor, options: SpargeAttention) -> list[list[int]]:
    """One head of one document: the blocks of each tile."""
    k = k - k.mean(dim=0)
    tiles, blocks = chunks(q, options.tile), chunks(k, options.block)
    lists_of_tiles = []
    block_similar = [similar(block, options.similarity) for block in blocks]
    for number, tile in enumerate(tiles):
        visible = [not options.causal or j * options.block < (number + 1) * options.tile for j in range(len(blocks))]
        scores = [
            float(tile.mean(dim=0) @ block.mean(dim=0)) / math.sqrt(q.shape[1]) if ok and visible[j] else -math.inf
            for j, (block, ok) in enumerate(zip(blocks, block_similar, strict=True))
        ]
        weights = [math.exp(score - max(scores)) if score > -math.inf else 0.0 for score in scores]
        order = sorted(range(len(blocks)), key=lambda j: (-scores[j], j))
        if options.top:
            count = int(options.top * len(blocks))
        else:
            cumulative = torch.tensor([weights[j] for j in order]).double().cumsum(0) / max(sum(weights), 1e-300)
            count = int((cumulative <= options.mass).sum())
        selected = set(order[: max(count, 1)])
        selected |= {j for j, ok in enumerate(block_similar) if not ok}
        selected |= set() if similar(tile, options.similarity) else set(range(len(blocks)))
        selected |= {0} if options.sink else set()
        if options.diagonal:
            selected |= {t // options.block for t in range(number * options.tile, number * options.tile + len(tile))}
        lists_of_tiles.append(sorted(j for j in selected if visible[j]))
    return lists_of_tiles


@pytest.mark.parametrize(
    "options",
    [
        SpargeAttention(tile=16, block=8, similarity=-1.0, mass=0.7),
        SpargeAttention(tile=16, block=8, similarity=0.13, mass=0.5, sink=True),
        SpargeAttention(tile=16, block=8, similarity=0.13, mass=0.3, causal=False),
        SpargeAttention(tile=8, block=16, similarity=0.05, top=0.4),
        SpargeAttention(tile=16, block=16, similarity=-1.0, top=0.5, causal=False),
        SpargeAttention(tile=16, block=4, similarity=-1.0, top=0.1, diagonal=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_equals_the_published_block_map(options: SpargeAttention, heads: tuple[int, int]) -> None:
    rows = Rows.packed(LENGTHS, padding=3)
    q, k = normal(*((len(rows), n, 16) for n in heads))
    got = lists(select(options, q, k, rows))
    row = tile = block = 0
    for length in LENGTHS:
        num_tiles, num_blocks = -(-length // options.tile), -(-length // options.block)
        for head in range(heads[0]):
            of_head = head // (heads[0] // heads[1])
            expected = block_map(q[row : row + length, head], k[row : row + length, of_head], options)
            for number, chosen in enumerate(expected):
                assert got[head, tile + number] == [block + j for j in chosen], (length, head, number)
        row, tile, block = row + length, tile + num_tiles, block + num_blocks


def test_no_queries_or_keys_of_zero_length_spoil_the_choice() -> None:
    rows, zeros = Rows.packed([40]), torch.zeros(40, 1, 16)
    chosen = lists(select(SpargeAttention(tile=16, block=16), zeros, zeros, rows))
    assert list(chosen.values()) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("count", [3, 10, 50])
def test_equal_scores_are_counted_exactly(count: int) -> None:
    """Sums of fractions such as 1/50 differ with the order of summation, and so with the device; these do not."""
    rows = Rows.packed([16 * count])
    q, k = torch.ones(16 * count, 1, 16), torch.zeros(16 * count, 1, 16)
    for percent in range(10, 100, 10):
        sparge = SpargeAttention(tile=64, block=16, similarity=-1.0, mass=percent / 100, causal=False)
        expected = list(range(max(count * percent // 100, 1)))
        assert set(map(tuple, lists(select(sparge, q, k, rows)).values())) == {tuple(expected)}
