"""Ulysses (arXiv 2309.14509): an all-to-all turns each rank's tokens of all heads into all tokens of its heads.

Where there are fewer KV heads than ranks, each is sent to all ranks whose query heads share it, and the gradients of
these replicas are summed in the accumulation dtype at home.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.whole import Saved, WholeAttention, plan_whole
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, Attend, AttentionShape, Strategy, Volume


@final
class Ulysses(Strategy):
    """Needs the query heads to divide by the degree, and KV heads and degree to divide one way or the other."""

    deals_heads = True

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
        """Each way (P-1)/P of q, k, v, routing and out, with max(Hk, P) KV heads; the backward pass moves the same."""
        query_width = shape.heads.query * (shape.head_dim + shape.value_dim)
        kv_heads = max(shape.heads.kv, degree)
        per_token = (query_width + kv_heads * (shape.head_dim + shape.value_dim)) * shape.element_bytes
        per_token += kv_heads * shape.routing_width * shape.accumulation_bytes
        part = shape.tokens_local * per_token // degree
        return Volume(forward=(degree - 1) * part, backward=(degree - 1) * part)

    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        # In the order of the sequence, so that documents are runs again whatever the layout.
        order = shards.order()
        rows = shards.rows.take(shards.index.flatten()[order])
        local = heads.query // self.channel.size
        mine = range(self.channel.rank * local, (self.channel.rank + 1) * local)
        return _UlyssesAttend(
            tokens_local=shards.tokens_local,
            heads=heads,
            routing_width=mechanism.routing_width,
            channel=self.channel,
            order=order,
            inverse=order.argsort(),
            whole=plan_whole(mechanism, rows, heads, mine, backend=backend),
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _UlyssesAttend(Attend):
    channel: Channel
    order: Tensor
    """Place of each row of the sequence among the ranks' rows set end to end; `inverse` leads back."""
    inverse: Tensor
    whole: WholeAttention

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        by_rank = [_heads_by_rank(x, self.channel.size) for x in inputs]
        mine = self._gather_tokens(by_rank[:3], kind="ulysses_qkv")
        mine += self._gather_tokens(by_rank[3:], kind="ulysses_routing")
        my_out, saved = self.whole.forward(*mine)
        (out,) = self._scatter_tokens([my_out], kind="ulysses_out")
        return out.flatten(1, 2), saved

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        (my_dout,) = self._gather_tokens([_heads_by_rank(dout, self.channel.size)], kind="ulysses_dout")
        gradients = self.whole.backward(my_dout, saved)
        dq, *of_keys = self._scatter_tokens([g.to(dout.dtype) for g in gradients[:3]], kind="ulysses_dqkv")
        of_keys += self._scatter_tokens(list(gradients[3:]), kind="ulysses_drouting")
        return dq.flatten(1, 2), *(_sum_replicas(gradient, self.heads.kv) for gradient in of_keys)

    def lse(self, saved: Saved) -> Tensor | None:
        mine = self.whole.lse(saved)
        if mine is None:
            return None
        (lse,) = self._scatter_tokens([mine.unsqueeze(-1)], kind="ulysses_lse")
        return lse.flatten(1)

    def _gather_tokens(self, parts: list[Tensor], *, kind: str) -> list[Tensor]:
        """Exchange `[tokens_local, P, heads, width]` tensors for this rank's heads of all tokens, in sequence order."""
        if not parts:
            return []
        packed = torch.cat([part.flatten(2) for part in parts], dim=2)  # [tokens_local, P, widths]
        received = self.channel.all_to_all(packed.transpose(0, 1), kind=kind).flatten(0, 1)  # [tokens, widths]
        ordered = received[self.order.to(received.device)]
        return _split_heads(ordered, [part.shape[2:] for part in parts])

    def _scatter_tokens(self, parts: list[Tensor], *, kind: str) -> list[Tensor]:
        """The way back: this rank's heads of all tokens for `[tokens_local, P, heads, width]`, all ranks' heads."""
        if not parts:
            return []
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
