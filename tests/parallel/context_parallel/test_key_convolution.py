"""The convolution on keys over ranks, against one process in float64; bytes against the plan's formula and by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from farspan.kernels.layers.key_convolution import Taps, convolve, convolve_backward
from farspan.kernels.masks.rows import Rows
from farspan.parallel.comm import Traffic
from farspan.parallel.context_parallel.key_convolution import KeyConvolution
from farspan.parallel.context_parallel.strategy import Volume
from farspan.parallel.layout import LAYOUTS, Shards
from tests.support.mechanisms import normal
from tests.support.oracle import relative_error
from tests.support.rank_pool import RankPool, world_channel

TOLERANCE = 1e-10
HEADS, HEAD_DIM = 2, 4
DOCUMENTS = {
    "one": Rows.packed([97]),
    "ragged": Rows.packed([1, 30, 3, 17, 4, 2, 20]),
    # Under the contiguous layout of 8 ranks the last ones hold nothing but padding.
    "padded_ranks": Rows.packed([15, 7, 3], padding=40),
    "tiny": Rows.packed([3]),
}


@dataclass(frozen=True)
class Case:
    layout: str
    documents: str
    width: int
    dtype: torch.dtype = torch.float64

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """k of the full sequence, the weight and the gradient of what comes out; the same on every rank."""
        tokens = len(DOCUMENTS[self.documents])
        k, weight, dout = normal(*((rows, HEADS, HEAD_DIM) for rows in (tokens, self.width, tokens)), dtype=self.dtype)
        return k, weight, dout


CASES = [Case(layout, documents, width) for layout in LAYOUTS for documents in DOCUMENTS for width in (3, 5)]
Outcome = tuple[list[Tensor], Traffic, Traffic, Volume]


def run_cases(cases: list[Case]) -> list[Outcome]:
    """On each rank: out, dk and its part of dweight; the bytes sent forward and backward; the bytes that are stated."""
    return [run_case(case) for case in cases]


def run_case(case: Case) -> Outcome:
    channel = world_channel()
    shards = Shards.build(DOCUMENTS[case.documents], layout=case.layout, degree=channel.size)
    planned = KeyConvolution.plan(channel, shards, case.width)
    global_k, weight, global_dout = case.inputs()
    k, weight = shards.shard(global_k, channel.rank).requires_grad_(), weight.requires_grad_()
    out = planned(k, weight)
    forward = channel.traffic.take()
    gradients = torch.autograd.grad(out, (k, weight), shards.shard(global_dout, channel.rank))
    backward = channel.traffic.take()
    wide = 8 if case.dtype == torch.float64 else 4
    # Rows go out forward; backward the accumulated gradients of the halo return.
    rows, halo_rows = sum(planned.halo.sent), sum(planned.halo.received)
    row = HEADS * HEAD_DIM
    volume = Volume(forward=rows * row * case.dtype.itemsize, backward=halo_rows * row * wide)
    return [out.detach(), *gradients], forward, backward, volume


def expected_of(case: Case) -> list[Tensor]:
    k, weight, dout = (x.double() for x in case.inputs())
    taps = Taps.build(DOCUMENTS[case.documents], Rows.packed([]), case.width)
    dk, _, dweight = convolve_backward(dout, k, k[:0], weight, taps)
    return [convolve(k, k[:0], weight, taps), dk, dweight]


def unshard(case: Case, parts: list[list[Tensor]]) -> list[Tensor]:
    shards = Shards.build(DOCUMENTS[case.documents], layout=case.layout, degree=len(parts))
    out, dk, dweight = (torch.stack(part) for part in zip(*parts, strict=True))
    return [shards.unshard(out), shards.unshard(dk), dweight.sum(dim=0)]


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_equals_one_process(ranks: Callable[[int], RankPool], degree: int) -> None:
    results = ranks(degree).run(run_cases, CASES)
    wrong = []
    for number, case in enumerate(CASES):
        outcomes: list[Outcome] = [of_rank[number] for of_rank in results]
        found = unshard(case, [outcome[0] for outcome in outcomes])
        error = max(relative_error(a, b) for a, b in zip(found, expected_of(case), strict=True))
        if error > TOLERANCE:
            wrong.append(f"{case}: {error:.1e}")
        for rank, (_, forward, backward, volume) in enumerate(outcomes):
            if (forward.sent.total(), backward.sent.total()) != (volume.forward, volume.backward):
                wrong.append(f"{case}: rank {rank} sent {forward} and {backward}, not {volume}")
            if degree == 1 and (forward.sent or backward.sent):
                wrong.append(f"{case}: one rank sent {forward} and {backward}")
    assert not wrong, "\n".join(wrong)


def test_gradients_of_a_key_are_rounded_once(ranks: Callable[[int], RankPool]) -> None:
    """In bfloat16, keys read by other ranks: their gradient is the exact one, rounded."""
    case = Case("striped", "one", 5, torch.bfloat16)
    parts = [of_rank[0][0] for of_rank in ranks(4).run(run_cases, [case])]
    out, dk, _ = unshard(case, parts)
    exact_out, exact_dk, _ = expected_of(case)
    for got, exact in ((out, exact_out), (dk, exact_dk)):
        assert (got == exact.bfloat16()).double().mean() > 0.99


def kinds() -> tuple[set[str], set[str], str]:
    _, forward, backward, _ = run_case(Case("zigzag", "one", 3))
    with pytest.raises(ValueError, match="cannot be convolved") as error:
        KeyConvolution.plan(world_channel(), Shards.build(Rows.packed([9]), layout="zigzag", degree=3), 3)
    return set(forward.sent), set(backward.sent), str(error.value)


def test_bytes_are_counted_by_kind_and_other_degrees_refused(ranks: Callable[[int], RankPool]) -> None:
    message = "a sequence sharded over 3 ranks cannot be convolved on 2"
    assert ranks(2).run(kinds) == [({"halo"}, {"halo_gradient"}, message)] * 2
