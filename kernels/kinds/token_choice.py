"""Token choice: each KV head selects tokens of the sequence by their routing; only these attend, to each other.

All owners of rows learn all routing, one number per token and KV head, and so select the same. The selected tokens are
a sequence of their own, whose rows stay where their tokens lie:

    tokens             0  1  2  3  4  5        head 0 selects 1, 4, 5; head 1 selects 0, 4
    selected rows      1  4  5 | 0  4          two documents of one KV head each, positions 0 1 2 | 0 1

Among the selected rows there is one KV head: tensors are `[rows, G, width]`, with the G query heads of the KV head
that selected the row.

Where all tokens are local and the numbers of selected ones are known, so are all rows but for the tokens in them:
attention is planned once for a sequence, and the host waits for no device. Sharded tokens are selected by any number on
each rank, so that their rows are planned in each forward pass, by one copy of the choice.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from farspan.kernels.caching import once
from farspan.kernels.device_copies import DeviceCopies, copy_to
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.lifetimes.lifetimes import DocumentOrder
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.planner import (
    AttentionPlanner,
    Composition,
    Heads,
    HeadShare,
    InputSpec,
    Routing,
    RoutingSource,
    Saved,
    SequenceAttention,
    Sizes,
    no_routing,
)


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

    @property
    @abstractmethod
    def counts_are_known(self) -> bool:
        """Whether the length of a document decides how many of its tokens each KV head selects, and nothing else."""

    @abstractmethod
    def choose(self, logits: Tensor, candidates: "Candidates") -> Tensor:
        """Return whether each KV head selects each token, bool `[tokens, Hk]`, by float32 logits `[tokens, Hk]`.

        Both are of the full sequence, in its order, and where `candidates` are. Padding is never selected.
        """

    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        return _TokenChoiceAttention(self, planner, _KnownRows.of(self, planner))

    def route(self, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor) -> "TokenRouting":
        return TokenRouting(self.choose(routing[0][..., 0].float(), Candidates.of(global_rows)))

    def sample_routing(self, global_rows: Rows, heads: Heads, *, max_queries: int | None = None) -> "TokenRouting":
        logits = torch.randn(len(global_rows), heads.kv, generator=torch.Generator().manual_seed(0))
        return TokenRouting(self.choose(logits, Candidates.of(global_rows)))

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


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The tokens of a sequence that heads select from, document by document, by their positions; padding first.

    index: the token at each place. first, end: the places of the first and last token of its document. position: in
    its document. All int64 `[tokens]`. real: whether it is no padding, bool `[tokens]`.
    """

    index: Tensor
    first: Tensor
    end: Tensor
    position: Tensor
    real: Tensor

    @staticmethod
    def of(global_rows: Rows) -> "Candidates":
        order = DocumentOrder.of(global_rows)
        position, document = global_rows.position[order.index].long(), global_rows.document[order.index]
        return Candidates(order.index, order.first, order.end, position, document >= 0)

    def to(self, device: torch.device) -> "Candidates":
        columns = (self.index, self.first, self.end, self.position, self.real)
        return Candidates(*(copy_to(x, device) for x in columns))

    def selected(self, chosen: Tensor, nth: Tensor) -> Tensor:
        """Return the tokens of a choice head by head, in this order, int64 `[rows]`.

        chosen: bool `[tokens, Hk]`. nth: 1, 2, ... up to the number of chosen ones, int64 `[rows]`.
        """
        # How many are chosen up to each place: [tokens, Hk] -> [Hk, tokens] -> [Hk * tokens]
        count = chosen[self.index].t().flatten().cumsum(0)
        return self.index[torch.searchsorted(count, nth) % max(len(self.index), 1)]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenTokens:
    """The rows that KV heads select of a sequence, head by head, each document's in the order of their positions.

    rows: every head's part of every document is a document of its own, whose positions count from 0. real: which of
    them are not padding, int64 `[n]`, None if all are. token, head: where each of these comes from, int64 `[n]`.
    """

    rows: Rows
    real: Tensor | None
    token: Tensor
    head: Tensor

    @staticmethod
    def of(chosen: Tensor, global_rows: Rows) -> "ChosenTokens":
        """Return the rows of `chosen`, bool `[tokens, Hk]` on the CPU, of a full sequence."""
        documents, document = global_rows.document.unique(return_inverse=True)
        order = global_rows.ordinal().argsort()
        # [tokens, Hk] -> [Hk, tokens]: rows come head by head, each head's in the order of the sequence.
        head, place = chosen[order].t().nonzero(as_tuple=True)
        token = order[place]
        number = head * len(documents) + document[token]
        # Where the row's document begins: the first row of its number.
        first = torch.searchsorted(number, number)
        rows = Rows(position=(torch.arange(len(number)) - first).int(), document=number.int())
        return ChosenTokens(rows=rows, real=None, token=token, head=head)

    def local(self, index: Tensor, row_of_token: Tensor, device: torch.device) -> "ChosenTokens":
        """Return the rows at `index`, -1 for padding, with local rows for tokens: `row_of_token`, int64 `[tokens]`.

        Index maps of the result are on `device`.
        """
        real = (index >= 0).nonzero().squeeze(1)
        token, head = row_of_token[self.token[index[real]]], self.head[index[real]]
        return ChosenTokens(
            rows=self.rows.take(index),
            real=None if len(real) == len(index) else copy_to(real, device),
            token=copy_to(token, device),
            head=copy_to(head, device),
        )

    def collect(self, x: Tensor, kv_heads: int) -> Tensor:
        """Return `[rows, G, width]` of x `[tokens, Hk x G, width]`; padding is 0."""
        # [tokens, Hk x G, width] -> [tokens, Hk, G, width] -> [n, G, width]
        collected = x.unflatten(1, (kv_heads, -1))[self.token, self.head]
        if self.real is None:
            return collected
        return x.new_zeros(len(self.rows), *collected.shape[1:]).index_copy_(0, self.real, collected)

    def scatter(self, x: Tensor, shape: Sequence[int], *, fill: float = 0.0) -> Tensor:
        """Return `[tokens, Hk x G, width]`, `shape` its first two, of x `[rows, G, width]`; the rest is `fill`."""
        # Each pair of a token and a head occurs at most once, so that nothing is summed.
        full = x.new_full((shape[0], shape[1] // x.shape[1], *x.shape[1:]), fill)  # [tokens, Hk, G, width]
        full[self.token, self.head] = x if self.real is None else x[self.real]
        return full.flatten(1, 2)  # [tokens, Hk, G, width] -> [tokens, Hk x G, width]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _KnownRows:
    """The rows that every choice has, and attention among them.

    real: as in `ChosenTokens`. head: of each row that is not padding, nth: 1, 2, ..., int64 `[n]`.
    """

    among: SequenceAttention
    rows: Rows
    real: DeviceCopies | None
    head: DeviceCopies
    nth: DeviceCopies

    @staticmethod
    def of(mechanism: TokenChoice, planner: AttentionPlanner) -> "_KnownRows | None":
        """Return what is known before tokens are chosen; None where rows depend on the choice."""
        if not mechanism.counts_are_known or bool((planner.row_of_token < 0).any()):
            return None
        # All choices have the rows of this one, of one head, from other tokens.
        chosen = mechanism.choose(torch.zeros(len(planner.global_rows), 1), Candidates.of(planner.global_rows))
        of_any = ChosenTokens.of(chosen.expand(-1, planner.share.local_heads.kv), planner.global_rows)
        of_group = _planner_of(of_any, planner)
        local = of_any.local(of_group.tokens, planner.row_of_token, chosen.device)
        assert torch.equal(local.head, of_any.head), "rows that are all local keep their order"
        return _KnownRows(
            among=mechanism.among().plan(of_group),
            rows=local.rows,
            real=None if local.real is None else DeviceCopies(local.real),
            head=DeviceCopies(local.head),
            nth=DeviceCopies(torch.arange(1, len(local.head) + 1)),
        )


def _planner_of(selected: ChosenTokens, planner: AttentionPlanner) -> AttentionPlanner:
    """Return the planner of selected rows, each of which has the query heads of one KV head."""
    heads = planner.share.local_heads
    of_rows = planner.of_tokens(selected.rows, selected.token)
    return of_rows.of_heads(HeadShare.all(Heads(query=heads.query // heads.kv, kv=1)))


@final
@dataclass(frozen=True, eq=False)
class _TokenChoiceAttention(SequenceAttention):
    mechanism: TokenChoice
    planner: AttentionPlanner
    known_rows: _KnownRows | None

    def prepare(self, spec: InputSpec) -> None:
        self.planner.prepare_all_rows(spec.device)
        self._candidates_on(spec.device)
        known = self.known_rows
        if known is not None:
            for table in (known.real, known.head, known.nth, self._row_of_token):
                if table is not None:
                    table.on(spec.device)
            known.among.prepare(replace(spec, kv_heads=1))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, routing = inputs
        logits = self.planner.all_rows(routing[..., 0].float(), kind="choice")  # [tokens, Hk]
        among, chosen_tokens = self._among(self.mechanism.choose(logits, self._candidates_on(logits.device)))
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
            working_bytes=len(chosen_tokens.rows) * row,
        )

    def _among(self, chosen: Tensor) -> tuple[SequenceAttention, ChosenTokens]:
        """Return attention among the tokens `chosen`, bool `[tokens, Hk]`, and the local selected rows."""
        known, device = self.known_rows, chosen.device
        if known is None:
            # The host waits for the choice.
            selected = ChosenTokens.of(chosen.cpu(), self.planner.global_rows)
            of_group = _planner_of(selected, self.planner)
            local = selected.local(of_group.tokens, self.planner.row_of_token, device)
            return self.mechanism.among().plan(of_group), local
        token = self._candidates_on(device).selected(chosen, known.nth.on(device))
        row, real = self._row_of_token.on(device)[token], known.real and known.real.on(device)
        return known.among, ChosenTokens(rows=known.rows, real=real, token=row, head=known.head.on(device))

    @cached_property
    def _row_of_token(self) -> DeviceCopies:
        return DeviceCopies(self.planner.row_of_token)

    @cached_property
    def _candidates(self) -> dict[torch.device, Candidates]:
        cpu = torch.device("cpu")
        return {cpu: Candidates.of(self.planner.global_rows)}

    def _candidates_on(self, device: torch.device) -> Candidates:
        """Return the candidates on `device`, where they are copied once for all layers."""
        return once(self._candidates, device, lambda: self._candidates[torch.device("cpu")].to(device))
