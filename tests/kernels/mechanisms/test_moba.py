"""MoBA's choice against the published description, one query at a time."""

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.planning.gathered_batches import count_pairs
from farspan.kernels.planning.plan import Plan
from farspan.trainer.toml_config import from_tree
from tests.support.mechanisms import normal
from tests.support.sequence_shards import lists, select

LENGTHS = [1, 40, 64, 7, 90]


def expected(q: Tensor, k: Tensor, lengths: list[int], block: int, top_k: int) -> dict[tuple[int, int], list[int]]:
    """Document by document, as in the paper."""
    group = q.shape[1] // k.shape[1]
    selected, first_row, first_block = {}, 0, 0
    for length in lengths:
        blocks = [range(start, min(start + block, length)) for start in range(0, length, block)]
        means = [k[[first_row + t for t in rows]].mean(dim=0) for rows in blocks]
        for t in range(length):
            for head in range(q.shape[1]):
                scores = [float(q[first_row + t, head] @ means[i][head // group]) for i in range(t // block)]
                best = sorted(range(len(scores)), key=lambda i: -scores[i])[: top_k - 1]
                selected[head, first_row + t] = sorted(first_block + i for i in [*best, t // block])
        first_row, first_block = first_row + length, first_block + len(blocks)
    return selected


@pytest.mark.parametrize(("block", "top_k"), [(8, 3), (16, 1), (5, 100), (64, 2)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_the_best_blocks_are_chosen(block: int, top_k: int, heads: tuple[int, int]) -> None:
    rows = Rows.packed(LENGTHS, padding=6)
    q, k = normal(*((len(rows), n, 16) for n in heads))
    selection = select(MoBA(block=block, top_k=top_k), q, k, rows)
    assert lists(selection) == expected(q, k, LENGTHS, block, top_k)
    plan = Plan.build(rows, rows, MoBA().attention_mask(), heads=heads[0], selection=selection)
    assert count_pairs(plan, heads[1]) == MoBA(block=block, top_k=top_k).unmasked_pairs(rows)


def test_equal_scores_go_to_the_earlier_block() -> None:
    rows = Rows.packed([80])
    q, k = torch.zeros(80, 2, 8), torch.ones(80, 2, 8)
    chosen = lists(select(MoBA(block=8, top_k=4), q, k, rows))
    assert chosen[0, 79] == chosen[1, 75] == [0, 1, 2, 9]
    assert chosen[0, 17] == [0, 1, 2]


def test_any_number_of_blocks_is_all_of_them() -> None:
    """Positions are int32."""
    rows = Rows.packed([70, 3], padding=2)
    for top_k in (9, 2**31 + 1, 2**63 - 1):
        mechanism = MoBA(block=8, top_k=top_k)
        assert mechanism.keys_per_query(rows).tolist() == [*range(1, 71), 1, 2, 3, 0, 0]


@pytest.mark.parametrize("options", [{"block": 0}, {"top_k": 0}])
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises((ValueError, ConfigError), match="must be at least 1"):
        from_tree(MECHANISMS.get("moba"), options)
