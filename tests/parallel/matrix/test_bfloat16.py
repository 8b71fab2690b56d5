"""The matrix in bfloat16: errors of four ranks against those of one process."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.support.matrix import HEADS, Case, inner_size_for, label, one_process, run_cases, unshard
from tests.support.oracle import rms_error
from tests.support.rank_pool import RankPool


@pytest.mark.parametrize("mechanism", list(MECHANISMS))
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_loses_no_more_than_one_process_does(ranks: Callable[[int], RankPool], strategy: str, mechanism: str) -> None:
    """Partial results are merged in float32: the error of four ranks is that of one process in bfloat16.

    1.5: Ulysses rounds the gradients of a KV head's replicas before it sums them, and the sum again: of two equal
    roundings the root of 2, give or take. An lse is float32 throughout; its errors are too small to compare.
    """
    example = MECHANISMS.get(mechanism).examples()[0]
    inner_size = inner_size_for(strategy, 4, turn=0)
    case = Case(example, strategy, "zigzag", "ragged", HEADS[1], inner_size, torch.bfloat16)
    if STRATEGIES.get(strategy).unsupported_reason(example, case.heads, 4, inner_size) is not None:
        return
    single = replace(case, strategy="single", inner_size=1)
    expected = one_process(example, case.documents, case.heads, torch.bfloat16)

    def errors(of: Case, degree: int) -> list[float]:
        found: list[Tensor] = unshard(of, [parts[0][0] for parts in ranks(degree).run(run_cases, [of])])
        return [rms_error(a, b) for a, b in zip(found, expected, strict=True)]

    for got, allowed in zip(errors(case, 4), errors(single, 1), strict=True):
        assert got <= max(1.5 * allowed, 1e-5), f"{label(case)}: {got:.1e}, one process {allowed:.1e}"
