import math

import torch

from farspan.kernels.merge import empty_partial, merge_


def test_merge_equals_softmax_over_the_union() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 3, 20, generator=generator, dtype=torch.float64) * 30
    values = torch.randn(20, 5, generator=generator, dtype=torch.float64)
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
