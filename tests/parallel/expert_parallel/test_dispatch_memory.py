"""Memory of experts' rows: a hot expert takes what its tokens take, and no more than if they were spread evenly."""

from collections.abc import Callable

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_swiglu import grouped_swiglu
from farspan.parallel.expert_parallel.dispatch import send_to_experts
from tests.support.rank_pool import RankPool, world_channel

EXPERTS, WIDTH, INNER, TOKENS = 8, 16, 64, 2048
CHUNK_ROWS = 64


def peak_bytes(tokens: int, hot: bool) -> int:
    """On a rank: the most bytes of tensors at a time, in a forward and a backward pass, above its weights' gradients.

    Each token goes to one expert: to the last, or to each in turn. tokens: of all ranks together.
    """
    channel = world_channel()
    held, mine = EXPERTS // channel.size, tokens // channel.size
    x, weights = torch.randn(mine, WIDTH, requires_grad=True), torch.rand(mine, 1, requires_grad=True)
    shapes = ((held, INNER, WIDTH), (held, INNER, WIDTH), (held, WIDTH, INNER))
    matrices = gate, up, down = [torch.randn(shape, requires_grad=True) for shape in shapes]
    chosen = torch.full((mine, 1), EXPERTS - 1) if hot else torch.arange(mine)[:, None] % EXPERTS
    kept, dout = torch.ones(mine, 1, dtype=torch.bool), torch.randn(mine, WIDTH)
    whole, tracker = grouped_loop.CHUNK_ROWS, MemTracker()
    grouped_loop.CHUNK_ROWS = CHUNK_ROWS
    try:
        with tracker:
            under_way = send_to_experts(x, chosen, weights, kept, channel, EXPERTS)
            out = under_way.combine(lambda rows, counts: grouped_swiglu(rows, gate, up, down, counts))
            gradients = torch.autograd.grad(out, (x, weights, *matrices), dout)
    finally:
        grouped_loop.CHUNK_ROWS = whole
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - sum(gradient.nbytes for gradient in gradients[2:])


def test_a_hot_expert_takes_no_more_than_even_ones(ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(1)
    (hot,), (even,) = pool.run(peak_bytes, TOKENS, True), pool.run(peak_bytes, TOKENS, False)
    assert hot <= 1.01 * even


@pytest.mark.parametrize("degree", [1, 2])
def test_bytes_grow_with_tokens_of_a_hot_expert(ranks: Callable[[int], RankPool], degree: int) -> None:
    """On the rank that holds it, no more than linearly."""
    pool = ranks(degree)
    once, twice, four = (pool.run(peak_bytes, factor * TOKENS, True) for factor in (1, 2, 4))
    for less, more in ((once, twice), (twice, four)):
        assert more[-1] <= 2.01 * less[-1]
    # All ranks' rows come to the last one: at most so many times what it has of even loads.
    assert four[-1] <= degree * 1.01 * pool.run(peak_bytes, 4 * TOKENS, False)[-1]
