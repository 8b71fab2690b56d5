"""`grad_comm_dtype`: gradients of keys and values rounded once cost half the bytes and little accuracy.

Whatever the dtype, errors do not grow with the number of ranks, as every owner sums in float32.
"""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.nats import NAtS
from farspan.kernels.mechanisms.sparge import SpargeAttention
from farspan.kernels.mechanisms.window import Window
from farspan.parallel.comm import GradCommDtype
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards
from tests.support.matrix import (
    DOCUMENTS,
    HEADS,
    Case,
    differing_bytes,
    inner_size_for,
    one_process,
    run_cases,
    unshard,
)
from tests.support.mechanisms import attend, inputs_of
from tests.support.oracle import assert_close, rms_error
from tests.support.rank_pool import RankPool
from tests.support.simulation import simulate_attention

MOVES_GRADIENTS = ["ring", "gather", "fetch", "ulysses"]
GRAD_COMM_DTYPES: tuple[GradCommDtype, ...] = ("accumulation", "compute")
ONE_KV_HEAD = HEADS[2]
"""So that Ulysses has replicas whose gradients are summed, at every degree."""


def simulated(
    mechanism: Mechanism,
    strategy: str,
    degree: int,
    rows: Rows,
    inputs: list[Tensor],
    grad_comm_dtype: GradCommDtype = "accumulation",
) -> tuple[list[Tensor], int]:
    """Return all results of some ranks under zigzag, rounded as autograd rounds them, and the bytes sent backward."""
    shards = Shards.build(rows, layout="zigzag", degree=degree, work=mechanism.keys_per_query)
    found = simulate_attention(
        strategy,
        mechanism,
        shards,
        ONE_KV_HEAD,
        inputs,
        inner_size=inner_size_for(strategy, degree, turn=0),
        grad_comm_dtype=grad_comm_dtype,
    )
    out, *others = found.tensors
    lse, gradients = others[: 1 - len(inputs)], others[1 - len(inputs) :]
    rounded = [x.to(of.dtype) for x, of in zip(gradients, inputs[:-1], strict=True)]
    return [out, *lse, *rounded], sum(sent.backward for sent in found.sent)


OF_EACH_KIND = [
    Window(window=200),
    # Many blocks, so that partial results come from every rank.
    MoBA(block=8, top_k=16),
    SpargeAttention(tile=32, block=8, similarity=-0.1, mass=0.9),
    MoSA(sparsity=2),
    NAtS(window=40),
    Lightning(),
]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "single"])
def test_errors_of_no_kind_grow_with_the_degree(strategy: str) -> None:
    """Eight ranks against one process: partial results, states and queries' gradients are merged in float32, too.

    1.2: merges rounded to bfloat16 make it 1.28 for MoBA. A router's gradient is a difference, and is off by more.
    1.5: where heads are split, gradients of a recurrence's replicated keys are rounded before their sum is.
    """
    rows = Rows.packed([321])
    for mechanism in OF_EACH_KIND:
        if STRATEGIES.get(strategy).unsupported_reason(mechanism, ONE_KV_HEAD, 8, inner_size_for(strategy, 8, turn=0)):
            continue
        inputs = inputs_of(mechanism, len(rows), ONE_KV_HEAD, dtype=torch.bfloat16)
        expected = attend(mechanism, rows, ONE_KV_HEAD, [x.double() for x in inputs])
        one, eight = (
            [
                rms_error(a, b)
                for a, b in zip(simulated(mechanism, name, degree, rows, inputs)[0], expected, strict=True)
            ]
            for name, degree in (("single", 1), (strategy, 8))
        )
        limits = [1.5 if isinstance(mechanism, Lightning) else 1.2] * len(one)
        if mechanism.routing_width:
            limits[-1] = 1.35
        # A log-sum-exp is float32 throughout.
        grown = [a / max(b, 1e-5) for a, b in zip(eight, one, strict=True)]
        assert all(a <= limit for a, limit in zip(grown, limits, strict=True)), (mechanism, grown)


@pytest.mark.parametrize("strategy", MOVES_GRADIENTS)
def test_errors_do_not_grow_with_the_degree(strategy: str) -> None:
    """Of dk and dv, against those of one process, of three seeds together: a few rows make up most of each error.

    1.1: of the same size, that is; a sum rounded at every hop would have twice the error at 8 ranks as at 2. Rounded,
    the parts together have the error of one rounding of the sum, and the sum is rounded too: the root of 2, at most.
    """
    rows, mechanism, dtype = DOCUMENTS["ragged"], Dense(), torch.bfloat16
    squares, sent = defaultdict[object, float](float), {}
    for seed in (1, 2, 3):
        inputs = inputs_of(mechanism, len(rows), ONE_KV_HEAD, dtype=dtype, seed=seed)
        truth = attend(mechanism, rows, ONE_KV_HEAD, [x.double() for x in inputs])[3:]
        for name, degree in (("single", 1), (strategy, 2), (strategy, 4), (strategy, 8)):
            for comm_dtype in GRAD_COMM_DTYPES:
                found, sent[degree, comm_dtype] = simulated(mechanism, name, degree, rows, inputs, comm_dtype)
                wrong = (float((a.double() - b).square().sum()) for a, b in zip(found[3:], truth, strict=True))
                squares[degree, comm_dtype] += sum(wrong)
    single = squares[1, "accumulation"]
    for degree in (2, 4, 8):
        assert squares[degree, "accumulation"] <= 1.1**2 * single
        assert single < squares[degree, "compute"] <= 1.5**2 * single
        assert sent[degree, "compute"] < sent[degree, "accumulation"]


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
        one_process(Dense(), case.documents, case.heads),
    )
    assert_close(found, expected, 1e-10)
