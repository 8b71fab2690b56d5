"""Training steps whose Triton kernels run, by Triton's interpreter, equal those of the CPU's backend in bfloat16."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.moba import MoBA
from tests.support.pretend_cuda.cells import Cell, cells
from tests.support.pretend_cuda.pool import PretendPools
from tests.support.pretend_cuda.step import Stepped, take_step
from tests.support.pretend_cuda.tensor import CUDA, PretendDevice

LOSS_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 0.02
"""Of norms: gradients are sums of numbers of 8 bits, rounded in another order; the largest measured is 0.0124."""
ONE_LAYER = "model.layers=1"
ON_RANKS = {
    ("moba", "fetch", "2"), ("moba", "ship", "2"), ("nats", "ring", "2"), ("lightning", "state", "2"),
    ("experts, expert degree 2", "ring", "2"),
}  # fmt: skip


def chosen() -> list[Cell]:
    """Return all models on one rank, without recomputation if there is such a cell, and some kinds of exchange."""
    alone = {cell.name: cell for cell in reversed(cells()) if cell.ranks == 1}
    return [*alone.values(), *(cell for cell in cells() if cell.key[:3] in ON_RANKS)]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


@pytest.mark.parametrize("cell", chosen(), ids=str)
def test_step_equals_that_of_the_cpu(pretend_ranks: PretendPools, cell: Cell) -> None:
    settings, pool = (*cell.all_settings, ONE_LAYER), pretend_ranks(cell.ranks)
    found: list[Stepped] = pool.run(partial(take_step, settings, on_device=True, runs_kernels=True))
    expected: list[Stepped] = pool.run(partial(take_step, settings, on_device=False))
    for of_device, of_cpu in zip(found, expected, strict=True):
        assert math.isclose(of_device.loss, of_cpu.loss, abs_tol=LOSS_TOLERANCE)
        assert of_device.gradients.keys() == of_cpu.gradients.keys()
        errors = {name: difference(of_device.gradients[name], of_cpu.gradients[name]) for name in of_cpu.gradients}
        assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


def routes_agree() -> list[bool]:
    """Whether a choice on the device, as `gpu_checks` asks for it, is that on the CPU."""
    rows, generator = Rows.packed([20, 13], padding=3), torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(rows), heads, 16, generator=generator) for heads in (4, 2))
    mechanism = MoBA(block=3, top_k=3)
    on_cpu = mechanism.route(rows, Heads(query=4, kv=2), q, k)
    with PretendDevice(runs_kernels=True):
        on_device = mechanism.route(rows, Heads(query=4, kv=2), q.to(CUDA), k.to(CUDA))
    return [torch.equal(a, b) for a, b in zip(on_cpu.tensors(), on_device.tensors(), strict=True)]


def test_a_choice_is_made_by_the_kernels(pretend_ranks: PretendPools) -> None:
    assert pretend_ranks(1).run(routes_agree) == [[True, True]]
