"""Gathered attention where tokens are dealt: heads choose among all ranks' tokens, then only what they chose travels.

All ranks learn all routing (one number per token and KV head) and so choose alike. What they chose is a sequence of
its own, whose rows lie where their tokens do; it runs under the same strategy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from farspan.kernels.gathering import Gathering
from farspan.kernels.mechanism import Gathered, Heads, Total
from farspan.kernels.whole import Saved, attend_gathered, attend_gathered_backward, gathered_lse
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import Attend, AttentionShape


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class GatheredAttend(Attend):
    """`total` sums over the ranks; `plan` plans attention among chosen rows, dealt as its argument says."""

    mechanism: Gathered
    shards: Shards
    rank: int
    total: Total
    plan: Callable[[Shards], Attend]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        dealt, gathering = deal_chosen(self.mechanism, self._all_logits(inputs[3]), self.shards, self.rank)
        return attend_gathered(self.plan(dealt), gathering, *inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return attend_gathered_backward(dout, saved)

    def lse(self, saved: Saved) -> Tensor:
        return gathered_lse(saved)

    def _all_logits(self, routing: Tensor) -> Tensor:
        """Return the routing of the whole sequence, float32 `[tokens, Hk]`."""
        index = self.shards.index[self.rank].to(routing.device)
        logits = torch.zeros(len(self.shards.rows), self.heads.kv, device=routing.device)
        logits[index[index >= 0]] = routing[index >= 0, :, 0].float()
        return self.total(logits)


def deal_chosen(mechanism: Gathered, logits: Tensor, shards: Shards, rank: int) -> tuple[Shards, Gathering]:
    """Return the chosen rows, dealt to the ranks that hold their tokens; and those of `rank`, by its local tokens."""
    whole = Gathering.of(mechanism.choose(logits, shards.rows), shards.rows)
    local = shards.index.flatten()
    place = torch.empty(len(shards.rows), dtype=torch.int64)
    place[local[local >= 0]] = torch.arange(len(local))[local >= 0]
    holder, token = place[whole.token] // shards.tokens_local, place[whole.token] % shards.tokens_local
    counts = holder.bincount(minlength=shards.degree)
    # At least one row, of padding if need be: transfers are not empty.
    index = torch.full((shards.degree, max(int(counts.max()), 1)), -1)
    order = holder.argsort(stable=True)
    nth = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index[holder[order], nth] = order
    mine = index[rank]
    gathering = Gathering(
        token=torch.cat((token, token.new_full((1,), -1)))[mine],
        head=torch.cat((whole.head, whole.head.new_zeros(1)))[mine],
        rows=whole.rows.take(mine),
    )
    return Shards(rows=whole.rows, index=index), gathering


def gathered_heads(heads: Heads) -> Heads:
    """Return the heads of attention among chosen rows: one KV head and its group."""
    return Heads(query=heads.query // heads.kv, kv=1)


def gathered_shape(shape: AttentionShape, rows_local: int) -> AttentionShape:
    """Return the shape of what travels where tokens are dealt: the chosen rows that a rank holds, without routing."""
    return replace(shape, tokens_local=rows_local, heads=gathered_heads(shape.heads), routing_width=0)
