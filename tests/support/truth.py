"""What each kind of mechanism computes, written a second time: differentiable, in float64, with every pair of rows.

A kind registers both functions; `tests/kernels/test_sequence_attention.py` holds all mechanisms to them.
"""

from collections.abc import Sequence
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.kinds.kv_lifetime import KVLifetime
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.recurrent import Recurrent
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.kinds.token_choice import Candidates, TokenChoice
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.mechanisms.nats import NAtS
from tests.support import lifetimes, oracle
from tests.support.sequence_shards import select


class Truth(NamedTuple):
    """lse: None where there is no single softmax. penalty: is added to the loss."""

    out: Tensor
    lse: Tensor | None = None
    penalty: Tensor | None = None


@singledispatch
def visible(mechanism: Mechanism, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    """Return which keys each query sees for q, k, v and routing of these rows, bool `[Hq, T, T]`."""
    raise NotImplementedError(f"register {type(mechanism).__name__}'s kind")


@singledispatch
def attend(mechanism: Mechanism, inputs: Sequence[Tensor], rows: Rows) -> Truth:
    """Return the result for q, k, v and routing of these rows."""
    raise NotImplementedError(f"register {type(mechanism).__name__}'s kind")


def expect(mechanism: Mechanism, inputs: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """Return out, lse if there is a softmax, and the gradients of q, k, v and routing; inputs end with that of out."""
    *leaves, dout = (x.detach().double() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    found = attend(mechanism, leaves, rows)
    loss = (found.out * dout).sum() + (0.0 if found.penalty is None else found.penalty)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [found.out.detach(), *([] if found.lse is None else [found.lse.detach()]), *gradients]


@visible.register
def _(mechanism: Masked, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    return oracle.visible_mask(rows, rows, mechanism.attention_mask(), inputs[0].shape[1])


@attend.register
def _(mechanism: Masked, inputs: Sequence[Tensor], rows: Rows) -> Truth:
    q, k, v = inputs[:3]
    return Truth(*oracle.attention(q, k, v, visible(mechanism, inputs, rows)))


@visible.register
def _(mechanism: Routed, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    q, k = (x.detach() for x in inputs[:2])
    mask = oracle.visible_mask(rows, rows, mechanism.attention_mask(), q.shape[1])
    return mask & oracle.selected_mask(select(mechanism, q, k, rows), rows, q.shape[1])


@visible.register
def _(mechanism: TokenChoice, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    q, k, _, routing = inputs
    chosen = mechanism.choose(routing[..., 0].detach().float(), Candidates.of(rows)).t()
    chosen = chosen.repeat_interleave(q.shape[1] // k.shape[1], dim=0)
    both = chosen[:, :, None] & chosen[:, None, :]
    return both & oracle.visible_mask(rows, rows, mechanism.among().attention_mask(), q.shape[1])


@attend.register
def _(mechanism: TokenChoice, inputs: Sequence[Tensor], rows: Rows) -> Truth:
    q, k, v, routing = inputs
    out, lse = oracle.attention(q, k, v, visible(mechanism, inputs, rows))
    return Truth(out / (1 + torch.exp(-routing)).repeat_interleave(q.shape[1] // k.shape[1], dim=1), lse)


@visible.register
def _(mechanism: KVLifetime, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    assert isinstance(mechanism, NAtS)
    group = inputs[0].shape[1] // inputs[1].shape[1]
    return lifetimes.visible(inputs[3], rows, mechanism.window).repeat_interleave(group, dim=0)


@attend.register
def _(mechanism: KVLifetime, inputs: Sequence[Tensor], rows: Rows) -> Truth:
    assert isinstance(mechanism, NAtS)
    q, k, v, routing = inputs
    types = lifetimes.one_hot_types(routing, rows, mechanism.temperature)
    out, lse = lifetimes.attention(q, k, v, types, rows, mechanism.window)
    return Truth(out, lse, lifetimes.penalty(types, rows, mechanism.penalty))


@visible.register
def _(mechanism: Recurrent, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    return oracle.visible_mask(rows, rows, AttentionMask(causal=True), inputs[0].shape[1])


@attend.register
def _(mechanism: Recurrent, inputs: Sequence[Tensor], rows: Rows) -> Truth:
    q, k, v = inputs
    return Truth(oracle.decayed_sums(q, k, v, mechanism.decay(q.shape[1]), rows))
