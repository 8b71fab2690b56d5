"""VMoBA's bricks and its four ways to choose, written a second time."""

import itertools
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanisms.vmoba import VMoBA
from farspan.kernels.planner import Heads
from tests.support.sequence_shards import check_by_document, lists, select

LENGTHS = [96, 5, 130]


def brick_of(position: int, options: VMoBA) -> tuple[int, ...]:
    """The brick of a token, as coordinates."""
    pixels = math.prod(options.frame)
    coordinates = [position // pixels]
    for number, size in enumerate(options.frame):
        coordinates.append(position % pixels // math.prod(options.frame[number + 1 :]) % size)
    return tuple(c // brick if brick else 0 for c, brick in zip(coordinates, options.brick, strict=True))


def selected(scores: dict[tuple[int, int], float], own: set[tuple[int, int]], options: VMoBA) -> set[tuple[int, int]]:
    """The selected ones of (query, block) pairs that are ranked together."""
    others = sorted((pair for pair in scores if pair not in own), key=lambda pair: -scores[pair])
    if options.rule == "top_k":
        return own | set(others[: (options.top_k - 1) * len(own)])
    low, high = min(scores.values()), max(scores.values())
    scaled = {pair: (score - low) / (high - low) for pair, score in scores.items()} if high > low else scores
    rest = options.share * sum(scaled.values()) - sum(scaled[pair] for pair in own)
    for count in range(1, len(others) + 1):
        if sum(scaled[pair] for pair in others[:count]) >= rest:
            return own | set(others[:count])
    return own | set(others)


def visible(q: Tensor, k: Tensor, options: VMoBA) -> Tensor:
    """One head of one document: which keys each query sees."""
    length = len(q)
    names = [brick_of(t, options) for t in range(length)]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    block = torch.tensor([numbers[name] for name in names])
    means = [k[block == j].mean(dim=0) for j in range(len(numbers))]
    scores = {(t, j): float(q[t] @ mean) for t in range(length) for j, mean in enumerate(means)}
    own = {(t, int(block[t])) for t in range(length)}
    if options.scope == "head":
        pairs = selected(scores, own, options)
    else:
        rows = [{pair: s for pair, s in scores.items() if pair[0] == t} for t in range(length)]
        pairs = set().union(*(selected(row, {(t, int(block[t]))}, options) for t, row in enumerate(rows)))
    mask = torch.zeros(length, length, dtype=torch.bool)
    for t, j in pairs:
        mask[t] |= block == j
    return mask


BRICKS = [(1, 0, 0), (0, 2, 3), (2, 2, 4)]
RULES: list[Literal["threshold", "top_k"]] = ["threshold", "top_k"]
SCOPES: list[Literal["query", "head"]] = ["query", "head"]
OPTIONS = [
    VMoBA(frame=(4, 6), brick=brick, rule=rule, scope=scope, share=0.35, top_k=2)
    for brick, rule, scope in itertools.product(BRICKS, RULES, SCOPES)
]
OPTIONS += [
    VMoBA(brick=(10,), share=0.99),
    VMoBA(brick=(10,), share=1e-6, scope="head"),
    VMoBA(brick=(10,), rule="top_k", top_k=1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_published_choice(options: VMoBA) -> None:
    check_by_document(options, LENGTHS, (2, 1), lambda q, k: visible(q, k, options))


@pytest.mark.parametrize("scope", SCOPES)
def test_equal_scores_are_shared_out(scope: Literal["query", "head"]) -> None:
    """No score stands out: a third of the blocks is a third of the scores; a joint ranking cannot tell them apart."""
    rows, zeros = Rows.packed([90]), torch.zeros(90, 1, 8)
    chosen = select(VMoBA(brick=(10,), share=1 / 3, scope=scope), zeros, zeros, rows)
    assert set(chosen.offsets.diff().tolist()) == {3 if scope == "query" else 9}


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_scores_a_query_takes_the_earlier_block(rule: Literal["threshold", "top_k"]) -> None:
    """After its own, whatever the device; the joint ranking of a head takes all of them."""
    rows, zeros = Rows.packed([90]), torch.zeros(90, 1, 8)
    chosen = lists(select(VMoBA(brick=(10,), rule=rule, share=1 / 3, top_k=3), zeros, zeros, rows))
    for query in range(90):
        own = query // 10
        assert chosen[0, query] == sorted([own, *[block for block in range(9) if block != own][:2]])


def test_bricks_must_fit_the_frame() -> None:
    with pytest.raises(ValueError, match=r"brick=\[2, 2\] must have a size for time and one for each"):
        VMoBA(frame=(4, 6), brick=(2, 2))


def test_sums_of_a_joint_ranking_have_to_fit() -> None:
    """65536 tokens in as many blocks are 2^32 pairs of up to 2^31 each: one more than an int64 holds."""
    options, heads = VMoBA(brick=(1,), scope="head"), Heads(query=1, kv=1)
    reason = options.unsupported_reason(heads, 1 << 16)
    assert reason is not None
    assert "take larger bricks" in reason
    assert options.unsupported_reason(heads, (1 << 16) - 1) is None
    for other in (replace(options, brick=(2,)), replace(options, scope="query"), replace(options, rule="top_k")):
        assert other.unsupported_reason(heads, 1 << 16) is None
