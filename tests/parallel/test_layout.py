import pytest
import torch

from farspan.kernels.errors import ConfigError
from farspan.kernels.plan import Plan
from farspan.kernels.rows import PADDING, Rows
from farspan.kernels.visibility import Visibility
from farspan.parallel.layout import LAYOUTS, Shards


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_who_holds_what(layout: str, expected: list[list[int]]) -> None:
    assert LAYOUTS[layout](8, 2).tolist() == expected


@pytest.mark.parametrize("tokens", [1, 7, 64, 101])
@pytest.mark.parametrize("degree", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_token_has_one_place_and_the_way_back(layout: str, degree: int, tokens: int) -> None:
    shards = Shards.deal(Rows.packed([tokens]), layout=layout, degree=degree)
    held = shards.index[shards.index >= 0]
    assert held.sort().values.tolist() == list(range(tokens))
    assert shards.tokens_local * degree < tokens + 2 * degree
    x = torch.randn(tokens, 3)
    parts = torch.stack([shards.shard(x, rank, fill=torch.nan) for rank in range(degree)])
    assert int(parts.isnan().any(-1).sum()) == shards.tokens_local * degree - tokens
    assert torch.equal(shards.unshard(parts), x)


def test_padding_rows_belong_to_no_document() -> None:
    shards = Shards.deal(Rows.packed([5]), layout="contiguous", degree=2)
    assert shards.rows_of(1).document.tolist() == [0, 0, PADDING]


@pytest.mark.parametrize("degree", [2, 8, 64])
def test_zigzag_and_striped_even_out_causal_work(degree: int) -> None:
    """Largest over mean visible area: 2 - 1/P for contiguous, even for the others up to one diagonal."""
    tokens = 64 * 2 * degree
    rows = Rows.packed([tokens])

    def imbalance(layout: str) -> float:
        shards = Shards.deal(rows, layout=layout, degree=degree)
        work = [Plan.build(shards.rows_of(rank), rows, Visibility(), heads=1).visible_pairs for rank in range(degree)]
        assert sum(work) == tokens * (tokens + 1) // 2
        return max(work) * degree / sum(work)

    assert imbalance("contiguous") == pytest.approx(2 - 1 / degree, rel=0.02)
    assert imbalance("zigzag") == 1.0
    assert imbalance("striped") < 1.01


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.layout='zigzg' does not exist.*Did you mean 'zigzag'"):
        Shards.deal(Rows.packed([4]), layout="zigzg", degree=2)
