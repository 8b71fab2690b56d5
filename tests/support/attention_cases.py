"""Attention of rows to rows on one backend: inputs, the result, and the oracle's in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.backend import BACKENDS
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.neighborhood import Dimension, Neighborhood
from farspan.kernels.masks.rows import Rows
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import MECHANISMS, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planning.plan import Plan
from tests.support import oracle
from tests.support.sequence_shards import select

CPU = torch.device("cpu")
ABLE = [name for name in BACKENDS if BACKENDS.get(name).unavailable_reason(CPU) is None]
ROWS = {
    "one": Rows.packed([97]),
    "ragged": Rows.packed([1, 40, 3, 33], padding=5),
    "padding_only": Rows.packed([], padding=9),
    "shuffled": Rows.packed([50, 30], padding=3).take(torch.randperm(83, generator=torch.Generator().manual_seed(0))),
    "strided": Rows.packed([160]).take(torch.arange(1, 160, 2)),
}
# Masks that no mechanism uses obey the same contract.
ATTENTION_MASKS = [
    *(AttentionMask(causal=causal, window=window) for causal in (True, False) for window in (1, 7, 40)),
    AttentionMask(window=(3, 40, 3, 9), sinks=2),
    AttentionMask(causal=False, window=(1, 2, 90, 1)),
    AttentionMask(
        causal=False,
        neighborhood=Neighborhood(dimensions=(Dimension(length=5, window=3), Dimension(length=8, window=4, stride=2))),
    ),
]


def examples(kind: type[Mechanism] = Mechanism) -> list:
    """The examples of all mechanisms of a kind, as parameters of a test."""
    found = [example for name in MECHANISMS for example in MECHANISMS.get(name).examples()]
    return [pytest.param(example, id=str(example)) for example in found if isinstance(example, kind)]


@dataclass(frozen=True)
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def random(
        queries: int, keys: int, heads: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype
    ) -> "Tensors":
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return Tensors(
            q=draw(queries, heads[0], head_dim),
            k=draw(keys, heads[1], head_dim),
            v=draw(keys, heads[1], value_dim),
            dout=draw(queries, heads[0], value_dim),
        )


def run(tensors: Tensors, plan: Plan, backend: str) -> list[Tensor]:
    """out, lse, dq, dk and dv of a backend."""
    out, lse = attention_forward(tensors.q, tensors.k, tensors.v, plan, backend=backend)
    assert lse.dtype == accumulation_dtype(tensors.q.dtype)
    assert out.dtype in (tensors.q.dtype, lse.dtype)
    gradients = attention_backward(
        tensors.dout, tensors.q, tensors.k, tensors.v, out.to(tensors.q.dtype), lse, plan, backend=backend
    )
    return [out, lse, *gradients]


def expect(tensors: Tensors, mask: Tensor) -> list[Tensor]:
    """The same by the oracle, for a mask `[heads, queries, keys]`."""
    q, k, v = (x.double().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    out, lse = oracle.attention(q, k, v, mask)
    gradients = torch.autograd.grad(out, (q, k, v), tensors.dout.double(), allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *gradients]


def check(
    tensors: Tensors,
    queries: Rows,
    keys: Rows,
    attention_mask: AttentionMask,
    backend: str,
    selection: BlockSelection | None = None,
) -> None:
    """Compare the two for a plan with short runs."""
    heads = tensors.q.shape[1]
    plan = Plan.build(queries, keys, attention_mask, heads=heads, selection=selection, shortest_run=8)
    expected = expect(tensors, mask_of(queries, keys, attention_mask, heads, selection))
    names = ("out", "lse", "dq", "dk", "dv")
    pairs = zip(names, run(tensors, plan, backend), expected, strict=True)
    errors = {name: oracle.relative_error(got, right) for name, got, right in pairs}
    assert max(errors.values()) <= oracle.RELATIVE_TOLERANCE[tensors.q.dtype], errors


def mask_of(
    queries: Rows, keys: Rows, attention_mask: AttentionMask, heads: int, selection: BlockSelection | None
) -> Tensor:
    """The oracle's mask `[heads, queries, keys]`."""
    mask = oracle.visible_mask(queries, keys, attention_mask, heads)
    return mask if selection is None else mask & oracle.selected_mask(selection, keys, heads)


def mask_and_selection(
    mechanism: Mechanism, tensors: Tensors, rows: Rows
) -> tuple[AttentionMask, BlockSelection | None]:
    """The mask of a mechanism with a softmax, and its selection for the rows of one full sequence."""
    assert isinstance(mechanism, Masked)
    if not isinstance(mechanism, Routed):
        return mechanism.attention_mask(), None
    return mechanism.attention_mask(), select(mechanism, tensors.q, tensors.k, rows)
