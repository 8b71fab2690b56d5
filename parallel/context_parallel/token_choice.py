"""Gathered attention where tokens are dealt: heads choose among all ranks' tokens, then only what they chose travels.

All ranks learn all routing (one number per token and KV head) and so choose alike. What they chose is a sequence of
its own, whose rows lie where their tokens do; it runs under the same strategy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.mechanism import Heads, TokenChoice
from farspan.kernels.routing.token_choice import ChosenTokens
from farspan.kernels.sequence_attention import Saved, token_choice_backward, token_choice_forward, token_choice_lse
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.routing import moves_of_choice
from farspan.parallel.context_parallel.strategy import Chosen, DistributedAttention, Move, Queries, Sizes
from farspan.parallel.layout import Shards


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChoiceAttention(DistributedAttention):
    """`plan` plans attention among chosen rows, dealt as its argument says, by the strategy that is named."""

    mechanism: TokenChoice
    shards: Shards
    channel: Channel
    strategy: str
    plan: Callable[[Shards], DistributedAttention]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        chosen = self.mechanism.choose(self._all_logits(inputs[3]), self.shards.rows)
        dealt, chosen_tokens = shard_chosen_tokens(chosen, self.shards, self.channel.rank)
        return token_choice_forward(self.plan(dealt), chosen_tokens, *inputs)

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        return token_choice_backward(dout, saved)

    def lse(self, saved: Saved) -> Tensor:
        return token_choice_lse(saved)

    def moves(self, sizes: Sizes, chosen: Chosen = None) -> tuple[Move, ...]:
        """The sum of routing over all ranks, and attention among the chosen rows."""
        total = moves_of_choice(self.mechanism, self.shards.rows, self.heads, sizes, self.channel)
        return *self._among(chosen).moves(sizes), total

    @property
    def queries(self) -> Queries:
        return Queries(self.shards.index[self.channel.rank], self.heads.query)

    def working_bytes(self, sizes: Sizes, chosen: Chosen = None) -> int:
        """The chosen rows of q, k, v and out, and what attention among them holds."""
        among = self._among(chosen)
        width = (among.heads.query + among.heads.kv) * sizes.kv_width * sizes.element_bytes
        return among.tokens_local * width + among.working_bytes(sizes)

    def _among(self, chosen: Chosen) -> DistributedAttention:
        assert isinstance(chosen, Tensor), "what a gathered mechanism moves depends on what it chose"
        return self.plan(shard_chosen_tokens(chosen, self.shards, self.channel.rank)[0])

    def _all_logits(self, routing: Tensor) -> Tensor:
        """Return the routing of the whole sequence, float32 `[tokens, Hk]`."""
        index = self.shards.index[self.channel.rank].to(routing.device)
        logits = torch.zeros(len(self.shards.rows), self.heads.kv, device=routing.device)
        logits[index[index >= 0]] = routing[index >= 0, :, 0].float()
        return self.channel.all_reduce(logits, kind=f"{self.strategy}_choice")


def shard_chosen_tokens(chosen: Tensor, shards: Shards, rank: int) -> tuple[Shards, ChosenTokens]:
    """Return the rows chosen, bool `[tokens, Hk]`, dealt to the ranks that hold their tokens; and those of `rank`.

    The latter name their tokens as the rank has them.
    """
    whole = ChosenTokens.of(chosen, shards.rows)
    place = shards.slots()
    holder, token = place[whole.token] // shards.tokens_local, place[whole.token] % shards.tokens_local
    counts = holder.bincount(minlength=shards.degree)
    # At least one row, of padding if need be: transfers are not empty.
    index = torch.full((shards.degree, max(int(counts.max()), 1)), -1)
    order = holder.argsort(stable=True)
    nth = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index[holder[order], nth] = order
    mine = index[rank]
    chosen_tokens = ChosenTokens(
        token=torch.cat((token, token.new_full((1,), -1)))[mine],
        head=torch.cat((whole.head, whole.head.new_zeros(1)))[mine],
        rows=whole.rows.take(mine),
    )
    return Shards(rows=whole.rows, index=index), chosen_tokens


def token_choice_heads(heads: Heads) -> Heads:
    """Return the heads of attention among chosen rows: one KV head and its group."""
    return Heads(query=heads.query // heads.kv, kv=1)
