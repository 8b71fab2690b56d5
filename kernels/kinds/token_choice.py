"""Token choice: each KV head selects tokens of the sequence by their routing; only these attend, to each other.

All owners of rows learn all routing, one number per token and KV head, and so select the same. The selected tokens are
a sequence of their own, whose rows stay where their tokens lie:

    tokens             0  1  2  3  4  5        head 0 selects 1, 4, 5; head 1 selects 0, 4
    selected rows      1  4  5 | 0  4          two documents of one KV head each, positions 0 1 2 | 0 1

Among the selected rows there is one KV head: tensors are `[rows, G, width]`, with the G query heads of the KV head
that selected the row.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planner import (
    AttentionPlanner,
    Composition,
    Heads,
    HeadShare,
    Routing,
    RoutingSource,
    Saved,
    SequenceAttention,
    Sizes,
    no_routing,
)
from farspan.kernels.ragged import take_or


class TokenChoice(Mechanism):
    """A head's output at its tokens is multiplied by the sigmoid of their routing, which is how the router learns.

    It is 0 at all other tokens.
    """

    @property
    def routing_width(self) -> int:
        return 1

    @property
    def accesses(self) -> frozenset[Access]:
        return self.among().accesses

    @property
    def is_windowed(self) -> bool:
        return self.among().is_windowed

    @abstractmethod
    def among(self) -> Masked:
        """Return how the selected tokens of one document see each other; their positions count these from 0."""

    @abstractmethod
    def choose(self, logits: Tensor, global_rows: Rows) -> Tensor:
        """Return whether each KV head selects each token, bool `[tokens, Hk]`, by float32 logits `[tokens, Hk]`.

        Both are of the full sequence, in its order. Padding is never selected.
        """

    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        return _TokenChoiceAttention(self, planner)

    def route(self, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor) -> "TokenRouting":
        return TokenRouting(self.choose(routing[0][..., 0].float(), global_rows))

    def sample_routing(self, global_rows: Rows, heads: Heads, *, max_queries: int | None = None) -> "TokenRouting":
        logits = torch.randn(len(global_rows), heads.kv, generator=torch.Generator().manual_seed(0))
        return TokenRouting(self.choose(logits, global_rows))

    def _sample_rows(self, global_rows: Rows) -> Rows:
        """Return the rows that one KV head selects if its router has learned nothing."""
        chosen = self.sample_routing(global_rows, Heads(query=1, kv=1)).chosen
        return ChosenTokens.of(chosen, global_rows).rows

    def unmasked_pairs(self, rows: Rows) -> int:
        return self.among().unmasked_pairs(self._sample_rows(rows))

    def saved_bytes(self, heads: Heads, sizes: Sizes, global_rows: Rows) -> int:
        """Out of all tokens; q, k, v, out, log-sum-exp and routing of the selected ones."""
        # The rows that one KV head selects stand for those of every head.
        of_selected = super().saved_bytes(heads, sizes, global_rows) + heads.kv * sizes.accumulation_bytes
        out = heads.query * sizes.value_dim * sizes.element_bytes
        return out + of_selected * len(self._sample_rows(global_rows)) // max(len(global_rows), 1)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRouting(Routing):
    """chosen: whether each KV head selects each token of a full sequence, bool `[tokens, Hk]`."""

    chosen: Tensor

    def of_heads(self, share: HeadShare) -> "TokenRouting":
        return TokenRouting(self.chosen[:, share.kv_heads.start : share.kv_heads.stop])

    def tensors(self) -> list[Tensor]:
        return [self.chosen]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenTokens:
    """The rows that KV heads select of a sequence, head by head, each document's in the order of their positions.

    token, head: where each comes from, int64 `[rows]`; a token of -1 is padding. rows: every head's part of every
    document is a document of its own, whose positions count from 0.
    """

    token: Tensor
    head: Tensor
    rows: Rows

    @staticmethod
    def of(chosen: Tensor, global_rows: Rows) -> "ChosenTokens":
        """Return the rows of `chosen`, bool `[tokens, Hk]`, of a full sequence."""
        documents, document = global_rows.document.unique(return_inverse=True)
        order = global_rows.ordinal().argsort()
        # [tokens, Hk] -> [Hk, tokens]: rows come head by head, each head's in the order of the sequence.
        head, place = chosen.cpu()[order].t().nonzero(as_tuple=True)
        token = order[place]
        number = head * len(documents) + document[token]
        # Where the row's document begins: the first row of its number.
        first = torch.searchsorted(number, number)
        rows = Rows(position=(torch.arange(len(number)) - first).int(), document=number.int())
        return ChosenTokens(token=token, head=head, rows=rows)

    def local(self, index: Tensor, row_of_token: Tensor) -> "ChosenTokens":
        """Return the rows at `index`, -1 for padding, with local rows for tokens: `row_of_token`, int64 `[tokens]`."""
        token, head = take_or(row_of_token[self.token], index, -1), take_or(self.head, index, 0)
        return ChosenTokens(token=token, head=head, rows=self.rows.take(index))

    def collect(self, x: Tensor, kv_heads: int) -> Tensor:
        """Return `[rows, G, width]` of x `[tokens, Hk x G, width]`; padding is 0."""
        # Padding is not read: x may have no rows at all.
        real, token, head = self._real(x.device)
        collected = x.new_zeros(len(self.token), x.shape[1] // kv_heads, x.shape[2])
        # [tokens, Hk x G, width] -> [tokens, Hk, G, width] -> [rows, G, width]
        collected[real] = x.unflatten(1, (kv_heads, -1))[token, head]
        return collected

    def scatter(self, x: Tensor, shape: Sequence[int], *, fill: float = 0.0) -> Tensor:
        """Return `[tokens, Hk x G, width]`, `shape` its first two, of x `[rows, G, width]`; the rest is `fill`."""
        # Each pair of a token and a head occurs at most once, so that nothing is summed.
        real, token, head = self._real(x.device)
        full = x.new_full((shape[0], shape[1] // x.shape[1], *x.shape[1:]), fill)  # [tokens, Hk, G, width]
        full[token, head] = x[real]
        return full.flatten(1, 2)  # [tokens, Hk, G, width] -> [tokens, Hk x G, width]

    def _real(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that are not padding, and the token and head of each, int64 `[n]`."""
        # Found on the host, so that nothing waits for the device.
        real = (self.token >= 0).nonzero().squeeze(1)
        return real.to(device), self.token[real].to(device), self.head[real].to(device)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _TokenChoiceAttention(SequenceAttention):
    mechanism: TokenChoice
    planner: AttentionPlanner

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, routing = inputs
        logits = self.planner.all_rows(routing[..., 0].float(), kind="choice")  # [tokens, Hk]
        among, chosen_tokens = self._among(self.mechanism.choose(logits, self.planner.global_rows))
        part, saved = among.forward(*(chosen_tokens.collect(x, k.shape[1]) for x in (q, k, v)))
        gates = chosen_tokens.collect(routing, k.shape[1])  # [rows, 1, 1]
        # The product is in the accumulation dtype, which routing comes in.
        out = chosen_tokens.scatter((part * gates.sigmoid()).to(part.dtype), q.shape[:2])
        return out, Saved((part, gates, *saved.tensors), (chosen_tokens, among, q.shape[:2], k.shape[:2], saved.extras))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        part, gates, *tensors = saved.tensors
        chosen_tokens, among, of_queries, of_keys, extras = saved.extras
        dout, weight = chosen_tokens.collect(dout, of_keys[1]).to(gates.dtype), gates.sigmoid()
        # out = w part with w = sigmoid(gate), so that dgate = (dout . part) w (1 - w).
        dgates = (dout * part).sum(dim=(1, 2), keepdim=True) * weight * (1 - weight)
        dq, dk, dv = among.backward((dout * weight).to(part.dtype), Saved(tuple(tensors), extras))
        return chosen_tokens.scatter(dq, of_queries), *(chosen_tokens.scatter(x, of_keys) for x in (dk, dv, dgates))

    def lse(self, saved: Saved) -> Tensor | None:
        """-inf at tokens that are not selected."""
        chosen_tokens, among, of_queries, _, extras = saved.extras
        lse = among.lse(Saved(saved.tensors[2:], extras))
        return chosen_tokens.scatter(lse.unsqueeze(-1), of_queries, fill=float("-inf")).squeeze(-1)

    def composition(self, sizes: Sizes, routing: RoutingSource) -> Composition:
        found = routing()
        assert isinstance(found, TokenRouting), "what is sent depends on the tokens that heads select"
        among, chosen_tokens = self._among(found.chosen)
        heads, global_rows = self.planner.share.local_heads, self.planner.global_rows
        # q, k, v and out of the selected rows, each with one KV head and its group.
        row = (heads.query // heads.kv + 1) * sizes.kv_width * sizes.element_bytes
        return Composition(
            branches=((among, no_routing),),
            all_reduced=(len(global_rows) * heads.kv * torch.float32.itemsize, 0),
            working_bytes=len(chosen_tokens.token) * row,
        )

    def _among(self, chosen: Tensor) -> tuple[SequenceAttention, ChosenTokens]:
        """Plan attention among the tokens `chosen`, bool `[tokens, Hk]`; return it and the local selected rows."""
        selected, heads = ChosenTokens.of(chosen, self.planner.global_rows), self.planner.share.local_heads
        of_rows = self.planner.of_tokens(selected.rows, selected.token)
        of_group = of_rows.of_heads(HeadShare.all(Heads(query=heads.query // heads.kv, kv=1)))
        return self.mechanism.among().plan(of_group), selected.local(of_rows.tokens, self.planner.row_of_token)
