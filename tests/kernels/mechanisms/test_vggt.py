"""VGGT's choice of blocks, written a second time: patches and special tokens pulled apart as in the published code."""

import math

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.vggt import VGGT
from tests.support.sequence_shards import check_by_document, select

LENGTHS = [60, 7, 100]


def visible(q: Tensor, k: Tensor, options: VGGT) -> Tensor:
    """One head of one document: which keys each query sees, bool `[length, length]`."""
    length = len(q)
    is_special = torch.tensor([options.special > 0 and t % options.frame < options.special for t in range(length)])
    patches = (~is_special).nonzero().flatten()
    tiles, blocks = patches.split(options.tile), patches.split(options.block)
    mask = is_special[:, None] | is_special[None, :]
    for tile in tiles if len(patches) else []:
        scores = [float(q[tile].mean(dim=0) @ k[block].mean(dim=0)) / math.sqrt(q.shape[1]) for block in blocks]
        weights = [math.exp(score - max(scores)) for score in scores]
        order = sorted(range(len(blocks)), key=lambda j: (-scores[j], j))
        cumulative = torch.tensor([weights[j] for j in order]).double().cumsum(0) / sum(weights)
        count = max(int((cumulative <= options.mass + 1e-5).sum()), int(len(blocks) * (1 - options.sparsity)), 1)
        for j in order[:count]:
            mask[tile[:, None], blocks[j]] = True
    return mask


@pytest.mark.parametrize(
    "options",
    [
        VGGT(frame=20, special=3, mass=0.6, sparsity=0.9, tile=16, block=8),
        VGGT(frame=20, special=3, mass=0.1, sparsity=0.5, tile=16, block=8),
        VGGT(frame=25, special=24, mass=0.1, sparsity=0.5, tile=2, block=1),
        VGGT(mass=0.5, sparsity=0.75, tile=8, block=16),
        VGGT(mass=1.0, sparsity=0.75, tile=8, block=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_equals_the_published_choice(options: VGGT, heads: tuple[int, int]) -> None:
    check_by_document(options, LENGTHS, heads, lambda q, k: visible(q, k, options))


def test_special_tokens_must_leave_room() -> None:
    with pytest.raises(ValueError, match="special=5 must leave room for a patch in a frame of 5 tokens"):
        VGGT(frame=5, special=5)


def test_the_least_number_of_blocks_is_rounded_as_in_python() -> None:
    """int(20 * (1 - 0.9)) is 1, as 1 - 0.9 is below a tenth; in float32 it would be 2."""
    rows = Rows.packed([20 * 4])
    q, k = torch.ones(80, 1, 16), torch.zeros(80, 1, 16)
    assert select(VGGT(mass=0.0, sparsity=0.9, tile=80, block=4), q, k, rows).key_blocks.tolist() == [0]
