"""`grad_comm_dtype`: gradients of keys and values rounded once cost half the bytes and little accuracy.

Whatever the dtype, errors do not grow with the number of ranks, as every owner sums in float32.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from farspan.kernels.mechanism import MECHANISMS
from farspan.kernels.mechanisms.dense import Dense
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import HEADS, Case, differing_bytes, inner_size_for, reference, run_cases, unshard
from tests.support.oracle import assert_close, rms_error
from tests.support.rank_pool import RankPool

MOVES_GRADIENTS = ["ring", "gather", "fetch", "ulysses"]
ONE_KV_HEAD = HEADS[2]
"""So that Ulysses has replicas whose gradients are summed, at every degree."""


def errors(ranks: Callable[[int], RankPool], case: Case, degree: int) -> tuple[float, int]:
    """Return the error of dk and dv together, and the bytes that all ranks sent backward."""
    results = ranks(degree).run(run_cases, [case])
    found = unshard(case, [parts[0][0] for parts in results])
    expected = reference(case.mechanism, case.documents, case.heads, case.dtype)
    sent = sum(parts[0][1][1].counted.sent.total() for parts in results)
    found, truth = (torch.cat([x.flatten() for x in tensors[3:]]) for tensors in (found, expected))
    return rms_error(found, truth), sent


@pytest.mark.parametrize("strategy", MOVES_GRADIENTS)
def test_errors_do_not_grow_with_the_degree(ranks: Callable[[int], RankPool], strategy: str) -> None:
    """1.2: of the same size, that is; a sum rounded at every hop would have twice the error at 8 ranks as at 2.

    Rounded, each of P parts has the error of its own size, which together is that of one rounding of the sum, give or
    take; and the sum is rounded too: the root of 2 of one process, and some.
    """
    exact = Case(Dense(), strategy, "zigzag", "ragged", ONE_KV_HEAD, dtype=torch.bfloat16)
    single, _ = errors(ranks, replace(exact, strategy="single"), 1)
    found = {degree: errors(ranks, exact, degree) for degree in (2, 4, 8)}
    rounded = {degree: errors(ranks, replace(exact, grad_comm_dtype="compute"), degree) for degree in (2, 4, 8)}
    for degree in (2, 4, 8):
        assert found[degree][0] <= 1.2 * single
        assert rounded[degree][0] <= 1.7 * single
        assert rounded[degree][1] < found[degree][1]
    assert found[8][0] <= 1.2 * found[2][0]
    assert rounded[8][0] <= 1.2 * rounded[2][0]
    assert rounded[8][0] > found[8][0]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_bytes_are_those_of_the_formula_where_sums_are_wider(ranks: Callable[[int], RankPool], strategy: str) -> None:
    """In bfloat16, with gradients rounded or not; in float64, as the matrix has it, a number and a sum are as wide."""
    inner_size = inner_size_for(strategy, 4, turn=0)
    examples = [MECHANISMS.get(name).examples()[0] for name in MECHANISMS]
    cases = [
        Case(example, strategy, "striped", "ragged", ONE_KV_HEAD, inner_size, torch.bfloat16, grad_comm_dtype)
        for example in examples
        if STRATEGIES.get(strategy).unsupported_reason(example, ONE_KV_HEAD, 4, inner_size) is None
        for grad_comm_dtype in ("accumulation", "compute")
    ]
    results = ranks(4).run(run_cases, cases)
    wrong = [
        line
        for number, case in enumerate(cases)
        for line in differing_bytes(case, [of_rank[number][1] for of_rank in results])
    ]
    assert cases
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("strategy", MOVES_GRADIENTS)
def test_rounded_gradients_of_a_rank_that_has_padding_only(ranks: Callable[[int], RankPool], strategy: str) -> None:
    case = Case(Dense(), strategy, "contiguous", "padded_ranks", ONE_KV_HEAD, grad_comm_dtype="compute")
    results = ranks(8).run(run_cases, [case])
    assert not differing_bytes(case, [of_rank[0][1] for of_rank in results])
    found, expected = (
        unshard(case, [of_rank[0][0] for of_rank in results]),
        reference(Dense(), case.documents, case.heads),
    )
    assert_close(found, expected, 1e-10)
