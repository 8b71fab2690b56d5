"""Ulysses (arXiv 2309.14509): an all-to-all turns each rank's tokens of all heads into all tokens of its heads.

Where there are fewer KV heads than ranks, each is sent to all ranks whose query heads share it, and the gradients of
these replicas are summed in the accumulation dtype at home.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.attend import attend, attend_backward
from farspan.kernels.mechanism import Masked, Mechanism, choose
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.plan import Plan
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, Attend, AttentionShape, Heads, Saved, Strategy, Volume


@final
class Ulysses(Strategy):
    """Needs the query heads to divide by the degree, and KV heads and degree to divide one way or the other."""

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int) -> str | None:
        def deals(n: int) -> bool:
            return heads.query % n == 0 and (heads.kv % n == 0 or n % heads.kv == 0)

        works = [n for n in range(1, heads.query + 1) if deals(n)]
        if degree not in works:
            return (
                f"strategy 'ulysses' cannot deal {heads.query} query heads and {heads.kv} KV heads to "
                f"parallel.context={degree} ranks; these degrees work: {', '.join(map(str, works))}."
            )
        return None

    @classmethod
    def volume(cls, shape: AttentionShape, degree: int) -> Volume:
        """Each way (P-1)/P of q, k, v and out, with max(Hk, P) KV heads; the backward pass moves the same back."""
        query_width = shape.heads.query * (shape.head_dim + shape.value_dim)
        kv_width = max(shape.heads.kv, degree) * (shape.head_dim + shape.value_dim)
        part = shape.tokens_local * (query_width + kv_width) * shape.element_bytes // degree
        return Volume(forward=(degree - 1) * part, backward=(degree - 1) * part)

    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        assert isinstance(mechanism, Masked)
        # In the order of the sequence, so that documents are runs again whatever the layout.
        order = shards.order()
        rows = shards.rows.take(shards.index.flatten()[order])
        local = heads.query // self.channel.size
        mine = slice(self.channel.rank * local, (self.channel.rank + 1) * local)
        plan = Plan.build(rows, rows, mechanism.visibility().of_heads(mine), heads=local)
        return _UlyssesAttend(
            tokens_local=shards.tokens_local,
            heads=heads,
            channel=self.channel,
            order=order,
            inverse=order.argsort(),
            mechanism=mechanism,
            plan=plan,
            backend=backend,
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _UlyssesAttend(Attend):
    channel: Channel
    order: Tensor
    """Place of each row of the sequence among the ranks' rows set end to end; `inverse` leads back."""
    inverse: Tensor
    mechanism: Masked
    plan: Plan
    backend: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        by_rank = [_heads_by_rank(x, self.channel.size) for x in (q, k, v)]
        my_q, my_k, my_v = self._gather_tokens(by_rank, kind="ulysses_qkv")
        plan = choose(self.mechanism, self.plan, my_q, my_k)
        my_out, lse = attend(my_q, my_k, my_v, plan, backend=self.backend)
        my_out = my_out.to(q.dtype)
        (out,) = self._scatter_tokens([my_out], kind="ulysses_out")
        return out.flatten(1, 2), Saved((my_q, my_k, my_v, my_out, lse), (plan,))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        (my_dout,) = self._gather_tokens([_heads_by_rank(dout, self.channel.size)], kind="ulysses_dout")
        gradients = attend_backward(my_dout, *saved.tensors, plan=saved.plans[0], backend=self.backend)
        dq, dk, dv = self._scatter_tokens([g.to(dout.dtype) for g in gradients], kind="ulysses_dqkv")
        return dq.flatten(1, 2), _sum_replicas(dk, self.heads.kv), _sum_replicas(dv, self.heads.kv)

    def lse(self, saved: Saved) -> Tensor:
        (lse,) = self._scatter_tokens([saved.tensors[-1].unsqueeze(-1)], kind="ulysses_lse")
        return lse.flatten(1)

    def _gather_tokens(self, parts: list[Tensor], *, kind: str) -> list[Tensor]:
        """Exchange `[tokens_local, P, heads, width]` tensors for this rank's heads of all tokens, in sequence order."""
        packed = torch.cat([part.flatten(2) for part in parts], dim=2)  # [tokens_local, P, widths]
        received = self.channel.all_to_all(packed.transpose(0, 1), kind=kind).flatten(0, 1)  # [tokens, widths]
        ordered = received[self.order.to(received.device)]
        return _split_heads(ordered, [part.shape[2:] for part in parts])

    def _scatter_tokens(self, parts: list[Tensor], *, kind: str) -> list[Tensor]:
        """The way back: this rank's heads of all tokens for `[tokens_local, P, heads, width]`, all ranks' heads."""
        packed = torch.cat([part.flatten(1) for part in parts], dim=1)  # [tokens, widths]
        by_rank = packed[self.inverse.to(packed.device)].unflatten(0, (self.channel.size, -1))
        received = self.channel.all_to_all(by_rank, kind=kind).transpose(0, 1)  # [tokens_local, P, widths]
        return _split_heads(received, [part.shape[1:] for part in parts])


def _split_heads(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Split the last dimension into one tensor `[..., heads, width]` per (heads, width)."""
    parts = packed.split([shape.numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _heads_by_rank(x: Tensor, degree: int) -> Tensor:
    """Return `[tokens, P, heads per rank, width]`; heads fewer than ranks are repeated for neighbouring ranks."""
    return x.repeat_interleave(max(degree // x.shape[1], 1), dim=1).unflatten(1, (degree, -1))


def _sum_replicas(gradient: Tensor, heads: int) -> Tensor:
    """Sum gradients `[tokens, P, heads per rank, width]` of repeated heads into `[tokens, heads, width]`."""
    if heads >= gradient.shape[1]:
        return gradient.flatten(1, 2)
    return gradient.flatten(1, 2).to(accumulation_dtype(gradient.dtype)).unflatten(1, (heads, -1)).sum(dim=2)


STRATEGIES.add("ulysses", Ulysses)
