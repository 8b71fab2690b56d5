"""Attention of rows to rows on one backend: inputs, the result, and the oracle's in float64."""

from collections.abc import Sequence
from typing import NamedTuple, Self

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
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.merge import accumulation_dtype, empty_partial, merge_
from farspan.kernels.planning.plan import Plan
from tests.support import oracle
from tests.support.mechanisms import normal
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
GRID = AttentionMask(
    causal=False,
    neighborhood=Neighborhood(dimensions=(Dimension(length=5, window=3), Dimension(length=8, window=4, stride=2))),
)
# Masks that no mechanism uses obey the same contract.
ATTENTION_MASKS = [
    *(AttentionMask(causal=causal, window=window) for causal in (True, False) for window in (1, 7, 40)),
    AttentionMask(window=(3, 40, 3, 9), sinks=2),
    AttentionMask(causal=False, window=(1, 2, 90, 1)),
    GRID,
]


class Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def random(
        cls,
        queries: int,
        keys: int,
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (16, 16),
        dtype: torch.dtype = torch.float64,
    ) -> Self:
        """heads: of queries, and of keys. dims: of queries and keys, and of values."""
        query, key = (queries, heads[0]), (keys, heads[1])
        return cls(*normal((*query, dims[0]), (*key, dims[0]), (*key, dims[1]), (*query, dims[1]), seed=3, dtype=dtype))


def run(tensors: Tensors, plan: Plan, backend: str) -> list[Tensor]:
    """out, lse, dq, dk and dv of a backend."""
    q, k, v, dout = tensors
    out, lse = attention_forward(q, k, v, plan, backend=backend)
    assert lse.dtype == accumulation_dtype(q.dtype)
    assert out.dtype in (q.dtype, lse.dtype)
    return [out, lse, *attention_backward(dout, q, k, v, out.to(q.dtype), lse, plan, backend=backend)]


def run_parts(tensors: Tensors, parts: Sequence[Tensor], plans: Sequence[Plan], backend: str) -> list[Tensor]:
    """The same of keys in parts, each with its plan; backward with the out and lse of all parts."""
    q, k, v, dout = tensors
    out, lse = empty_partial(*dout.shape, like=q)
    for part, plan in zip(parts, plans, strict=True):
        merge_(out, lse, *attention_forward(q, k[part], v[part], plan, backend=backend))
    dq, dk, dv = (torch.zeros_like(x, dtype=out.dtype) for x in (q, k, v))
    for part, plan in zip(parts, plans, strict=True):
        found = attention_backward(dout, q, k[part], v[part], out.to(q.dtype), lse, plan, backend=backend)
        assert all(x.dtype in (q.dtype, out.dtype) for x in found)
        dq += found[0]
        dk[part], dv[part] = (x.to(out.dtype) for x in found[1:])
    return [out, lse, dq, dk, dv]


def expect(tensors: Tensors, mask: Tensor) -> list[Tensor]:
    """The same by the oracle, for a mask `[heads, queries, keys]`."""
    *leaves, dout = (x.detach().double() for x in tensors)
    q, k, v = (x.requires_grad_() for x in leaves)
    out, lse = oracle.attention(q, k, v, mask)
    gradients = torch.autograd.grad(out, (q, k, v), dout, allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *gradients]


def check(
    tensors: Tensors,
    queries: Rows,
    keys: Rows,
    attention_mask: AttentionMask,
    backend: str,
    selection: BlockSelection | None = None,
) -> None:
    """Compare `run` with `expect` for a plan with short runs."""
    heads, tolerance = tensors.q.shape[1], oracle.RELATIVE_TOLERANCE[tensors.q.dtype]
    plan = Plan.build(queries, keys, attention_mask, heads=heads, selection=selection, shortest_run=8)
    mask = mask_of(queries, keys, attention_mask, heads, selection)
    oracle.assert_close(run(tensors, plan, backend), expect(tensors, mask), tolerance)


def check_blind(queries: Rows, keys: Rows, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """No query sees a key: zeros, also by the backend itself, which `attention_forward` spares such plans."""
    q, k, v, dout = tensors = Tensors.random(len(queries), len(keys), dtype=dtype)
    plan, itself = Plan.build(queries, keys, AttentionMask(), heads=4), BACKENDS.get(backend)
    out, lse = itself.forward(q, k, v, plan)
    for results in (run(tensors, plan, backend), [out, lse, *itself.backward(dout, q, k, v, out.to(dtype), lse, plan)]):
        assert results.pop(1).isneginf().all()
        assert [x.shape for x in results] == [x.shape for x in (dout, q, k, v)]
        assert not any(x.any() for x in results)


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
