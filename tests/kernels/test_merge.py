import math

import pytest
import torch

from farspan.kernels.merge import GatheredSums, empty_partial, merge_
from tests.support.mechanisms import normal


def test_merge_equals_softmax_over_the_union() -> None:
    scores, values = normal((7, 3, 20), (20, 5))
    scores *= 30
    out, lse = empty_partial(7, 3, 5, like=scores)
    for keys in (slice(0, 4), slice(4, 5), slice(5, 20)):
        merge_(out, lse, scores[..., keys].softmax(-1) @ values[keys], scores[..., keys].logsumexp(-1))
    assert torch.allclose(out, scores.softmax(-1) @ values, rtol=0, atol=1e-13)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=0, atol=1e-13)


def test_rows_that_saw_nothing_stay_empty_and_take_what_comes() -> None:
    out, lse = empty_partial(2, 1, 3, like=torch.empty(0, dtype=torch.bfloat16))
    assert out.dtype == lse.dtype == torch.float32
    nothing = torch.zeros(2, 1, 3), torch.full((2, 1), -math.inf)
    merge_(out, lse, *nothing)
    assert not out.any()
    assert lse.isneginf().all()
    part = torch.tensor([[[1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0]]]), torch.tensor([[0.5], [-math.inf]])
    merge_(out, lse, *part)
    merge_(out, lse, *nothing)
    assert torch.equal(out, part[0])
    assert torch.equal(lse, part[1])


def test_extreme_scores_neither_overflow_nor_vanish() -> None:
    out, lse = torch.ones(1, 1, 1), torch.tensor([[-20000.0]])
    merge_(out, lse, torch.full((1, 1, 1), 3.0), torch.tensor([[20000.0]]))
    assert out.item() == 3.0
    assert lse.item() == 20000.0


def test_gathered_sums_equal_softmax_over_the_union() -> None:
    """Rows meet their keys in different parts and orders; some parts outweigh others by more than exp(700)."""
    (scores, values), generator = normal((9, 24), (24, 5)), torch.Generator().manual_seed(0)
    scores *= 400
    sums = GatheredSums.empty(9, 5, like=scores)
    seen = torch.zeros(9, 24, dtype=torch.bool)
    for number in range(6):
        keys = slice(4 * number, 4 * number + 4)
        rows = torch.randperm(8, generator=generator)[: 2 + number]
        seen[rows, keys] = True
        part = scores[rows, keys]
        sums.add(rows, part.softmax(-1) @ values[keys], part.logsumexp(-1))
    out, lse = sums.merged()
    visible = scores.masked_fill(~seen, -math.inf)
    assert seen[:8].any(dim=1).all()
    assert torch.allclose(out[:8], visible.softmax(-1)[:8] @ values, rtol=0, atol=1e-13)
    assert torch.allclose(lse, visible.logsumexp(-1), rtol=1e-13, atol=0)
    assert not out[8].any()


def test_gathered_sums_are_float32_for_half_inputs_and_take_blind_parts() -> None:
    sums = GatheredSums.empty(2, 3, like=torch.empty(0, dtype=torch.bfloat16))
    part = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([-2e4, -math.inf])
    for _ in range(2):
        sums.add(torch.tensor([0, 1]), part[0].bfloat16(), part[1])
    out, lse = sums.merged()
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(out, part[0])
    assert lse.tolist() == [pytest.approx(-2e4 + math.log(2), rel=1e-6), -math.inf]
