"""Memory of experts' rows: a hot expert needs the memory of its tokens, no more than if they were even."""

from collections.abc import Callable

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_gemm import grouped_swiglu
from farspan.parallel.expert_parallel.dispatch import send_to_experts
from tests.support.rank_pool import RankPool, world_channel

EXPERTS, WIDTH, INNER, TOKENS = 8, 16, 64, 2048
CHUNK_ROWS = 64


def peak_bytes(tokens: int, hot: bool) -> int:
    """On a rank: the peak bytes of tensors in a forward and a backward pass, above its weights' gradients.

    Each token goes to one expert: to the last, or to each in turn. tokens: of all ranks together.
    """
    channel = world_channel()
    experts, tokens_local = EXPERTS // channel.size, tokens // channel.size
    x = torch.randn(tokens_local, WIDTH, requires_grad=True)
    weights = torch.rand(tokens_local, 1, requires_grad=True)
    shapes = ((experts, INNER, WIDTH), (experts, INNER, WIDTH), (experts, WIDTH, INNER))
    matrices = gate, up, down = [torch.randn(shape, requires_grad=True) for shape in shapes]
    chosen = torch.full((tokens_local, 1), EXPERTS - 1) if hot else torch.arange(tokens_local)[:, None] % EXPERTS
    selected, dout = torch.ones(tokens_local, 1, dtype=torch.bool), torch.randn(tokens_local, WIDTH)
    chunk_rows, tracker = grouped_loop.CHUNK_ROWS, MemTracker()
    grouped_loop.CHUNK_ROWS = CHUNK_ROWS
    try:
        with tracker:
            in_flight = send_to_experts(x, chosen, weights, selected, channel, EXPERTS)
            out = in_flight.combine(lambda rows, counts: grouped_swiglu(rows, gate, up, down, counts))
            gradients = torch.autograd.grad(out, (x, weights, *matrices), dout)
    finally:
        grouped_loop.CHUNK_ROWS = chunk_rows
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - sum(gradient.nbytes for gradient in gradients[2:])


def test_a_hot_expert_takes_no_more_than_even_ones(ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(1)
    (hot,), (even,) = pool.run(peak_bytes, TOKENS, True), pool.run(peak_bytes, TOKENS, False)
    assert hot <= 1.01 * even


@pytest.mark.parametrize("degree", [1, 2])
def test_bytes_grow_with_tokens_of_a_hot_expert(ranks: Callable[[int], RankPool], degree: int) -> None:
    """On its rank, at most linearly."""
    pool = ranks(degree)
    once, twice, four = (pool.run(peak_bytes, factor * TOKENS, True) for factor in (1, 2, 4))
    for less, more in ((once, twice), (twice, four)):
        assert more[-1] <= 2.01 * less[-1]
    # The last rank receives all rows: at most `degree` times those of even loads.
    assert four[-1] <= degree * 1.01 * pool.run(peak_bytes, 4 * TOKENS, False)[-1]
