import pytest
import torch

from farspan.kernels.routing.ranking import affinity, top


@pytest.mark.parametrize("count", [1, 3, 7, 50])
def test_top_is_a_stable_sort(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Few distinct values of both signs and both zeros, so that ties abound.
    scores = (torch.randn(40, 30, generator=generator) * 2).round() / 2
    scores[:, ::7] = -0.0
    scores[:5, :25] = float("-inf")
    scores[5, 3], scores[5, 9] = float("inf"), float("inf")
    for row, chosen in zip(scores.tolist(), top(scores, count).tolist(), strict=True):
        best = sorted((i for i in range(30) if row[i] > float("-inf")), key=lambda i: (-row[i], i))[:count]
        assert chosen == best + [-1] * (min(count, 30) - len(best))


def test_tiny_differences_count() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0])
    scores[1] = torch.nextafter(scores[1], torch.tensor(2.0))
    assert top(scores, 3).tolist() == [1, 0, 2]
    assert top(-scores, 3).tolist() == [0, 2, 1]


def test_affinity_does_not_depend_on_the_order_of_summation() -> None:
    generator = torch.Generator().manual_seed(0)
    q, summary = torch.randn(50, 8, 64, generator=generator), torch.randn(9, 2, 64, generator=generator)
    shuffled = torch.randperm(64, generator=generator)
    expected = affinity(q, summary)
    assert torch.equal(affinity(q[..., shuffled], summary[..., shuffled]), expected)
    assert torch.equal(affinity(q[7:8], summary), expected[:, 7:8])
    exact = torch.einsum("thd,bhd->htb", q.double(), summary.double().repeat_interleave(4, dim=1))
    torch.testing.assert_close(expected.double(), exact, rtol=1e-7, atol=1e-6)
