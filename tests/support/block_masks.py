"""Block masks read back as masks of tiles, and shards of rows that cut them in every way."""

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.triton_kernels.block_mask import COUNT_BITS, MAX_COUNT, BlockMask

SHARDS = {
    "one": Rows.packed([61]),
    "ragged": Rows.packed([1, 26, 3, 33], padding=5),
    "padding first": Rows.packed([40, 20], padding=30).take(torch.arange(90).roll(25)),
    "shuffled": Rows.packed([40, 21], padding=3).take(torch.randperm(64, generator=torch.Generator().manual_seed(0))),
    "zigzag": Rows.packed([128]).take(torch.cat((torch.arange(16, 32), torch.arange(96, 112)))),
}


def decode(lists: BlockMask, tiles: int, others: int) -> tuple[Tensor, Tensor]:
    """Whether a group's tile visits another in full, and in part: both `[groups, tiles, other tiles]`.

    The lists of the tiles in `order` are followed run by run, as kernels do; a tile that is visited twice fails.
    """
    groups = int(lists.group.max()) + 1
    found = torch.zeros(groups, tiles, 2, others, dtype=torch.int32)
    offsets, counts = (column[: groups * tiles * 2].view(groups, tiles, 2) for column in (lists.offsets, lists.counts))
    runs = lists.runs.tolist()
    for group in range(groups):
        for tile in lists.order.tolist():
            for partial in range(2):
                place, left = int(offsets[group, tile, partial]), int(counts[group, tile, partial])
                while left:
                    first, count = runs[place] >> COUNT_BITS, runs[place] & MAX_COUNT
                    assert 0 < count <= left
                    assert first + count <= others
                    found[group, tile, partial, first : first + count] += 1
                    place, left = place + 1, left - count
                # A kernel reads one ahead.
                assert place < len(runs)
    assert not (found > 1).any()
    full, partial = found.bool().unbind(2)
    return full, partial
