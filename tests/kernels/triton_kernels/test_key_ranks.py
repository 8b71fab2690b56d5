import numpy as np
import pytest
import torch

from farspan.kernels.masks.attention_mask import MAX_WINDOW, AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.triton_kernels.key_ranks import KeyRanks

KEYS = Rows.packed([50, 1, 30], padding=3).take(torch.randperm(84, generator=torch.Generator().manual_seed(0)))
ATTENTION_MASKS = [
    AttentionMask(),
    AttentionMask(causal=False),
    AttentionMask(window=7, sinks=3),
    AttentionMask(window=1),
    AttentionMask(causal=False, window=9, sinks=2),
    AttentionMask(causal=False, window=MAX_WINDOW),
]


@pytest.mark.parametrize("attention_mask", ATTENTION_MASKS, ids=str)
@pytest.mark.parametrize("queries", [KEYS, Rows.packed([60, 4]), Rows.packed([]), Rows.packed([], padding=2)])
def test_two_intervals_of_ranks_are_the_mask(queries: Rows, attention_mask: AttentionMask) -> None:
    for keys in (KEYS, KEYS.take(torch.arange(5, 40)), Rows.packed([])):
        ranks = KeyRanks.of(keys)
        first, last = ranks.near(queries, attention_mask)
        mask = (first[:, None] <= ranks.rank) & (ranks.rank <= last[:, None])
        if attention_mask.sinks:
            first, last = ranks.sinks(queries, attention_mask)
            mask |= (first[:, None] <= ranks.rank) & (ranks.rank <= last[:, None])
        assert np.array_equal(mask, attention_mask.mask(queries, keys).numpy())


def test_padding_has_no_rank() -> None:
    ranks = KeyRanks.of(KEYS)
    assert (ranks.rank[KEYS.document.numpy() < 0] == -1).all()
    assert sorted(ranks.rank) == [-1] * 3 + list(range(81))
