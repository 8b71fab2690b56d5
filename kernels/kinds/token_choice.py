"""Token choice: each KV head selects tokens of the sequence by their routing; only these attend, to each other.

All owners of rows learn all routing, one number per token and KV head, and so select the same. Where the length of a
document decides how many of its tokens each head selects, the selected ones are a sequence that is known but for the
tokens in it, with one token of each head in a row:

    tokens             0  1  2  3  4  5        head 0 selects 1, 4, 5; head 1 selects 0, 4, 5
    row 0  1  2        1  4  5 of head 0, 0  4  5 of head 1: one document, positions 0 1 2

Its attention is planned once for a sequence, and one process waits for no device. Of sharded tokens, any number of the
selected ones may be on a rank, so that rows have owners of their own, see `_KnownRows`: q, k and v of a selected token
and head go there, and out returns. The host waits once in a layer, for how many of them each rank sends to each.

Otherwise heads select different numbers, and the rows are planned in each forward pass, by one copy of the choice for
which the host waits. Each row has one KV head, with its G query heads, and stays where its token is:

    selected rows      1  4  5 | 0  4          two documents of one KV head each, positions 0 1 2 | 0 1
"""

from abc import abstractmethod
from dataclasses import dataclass, field
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
from farspan.kernels.recomputation import kept
from farspan.kernels.routing.ranking import best_in_groups
from farspan.kernels.routing.selected_rows import RowOwners, SelectedRows


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

    @property
    def is_causal(self) -> bool:
        return self.among().is_causal

    @abstractmethod
    def among(self) -> Masked:
        """Return how the selected tokens of one document see each other; their positions count these from 0."""

    @property
    @abstractmethod
    def counts_are_known(self) -> bool:
        """Whether the length of a document decides how many of its tokens each KV head selects, and nothing else."""

    @abstractmethod
    def scores(self, logits: Tensor, candidates: "Candidates") -> Tensor:
        """Return what each KV head ranks the candidates by, float32 `[tokens, Hk]` in their order.

        The best of each document are selected, and earlier ones of equals, if their number is known.
        """

    @abstractmethod
    def choose(self, logits: Tensor, candidates: "Candidates") -> Tensor:
        """Return whether each KV head selects each token, bool `[tokens, Hk]`, by float32 logits `[tokens, Hk]`.

        Both are of the full sequence, in its order, and where `candidates` are. Padding is never selected.
        """

    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        candidates = Candidates.of(planner.global_rows)
        known_rows = _KnownRows.of(self, planner, candidates) if self.counts_are_known else None
        return _TokenChoiceAttention(self, planner, candidates, known_rows)

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

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        """All that the selected ones see, shared out by what tokens would see if all were selected."""
        visible = self.among().keys_per_query(global_rows)
        return visible * (self.unmasked_pairs(global_rows) / visible.sum().clamp(min=1))

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChosenTokens:
    """The rows that KV heads select of a sequence, head by head, each document's in the order of their positions.

    rows: every head's part of every document is a document of its own, whose positions count from 0. token, head:
    where each row comes from, int64 `[rows]`.
    """

    rows: Rows
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
        return ChosenTokens(rows=rows, token=token, head=head)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _KnownRows:
    """The rows that every choice has, and attention among them.

    Each row lies with a token that an even choice would put there: so owners have rows in proportion to their tokens,
    where these are in the sequence, and of a choice that is nearly even few pairs move.

    ranks: of those taken among all candidates, the best of each document first, int64 `[n]`.
    first_place: token * Hk of each candidate among the local ones, less than -Hk if it is none of them, int64
    `[tokens]`. owners: None if there is one, which has all rows in order.
    """

    among: SequenceAttention
    ranks: DeviceCopies
    first_place: DeviceCopies
    owners: RowOwners | None

    @staticmethod
    def of(mechanism: TokenChoice, planner: AttentionPlanner, candidates: "Candidates") -> "_KnownRows":
        # Of equal scores the first are chosen: their places are the ranks of any choice.
        global_rows = planner.global_rows
        chosen = mechanism.choose(torch.zeros(len(global_rows), 1), candidates)
        ranks = chosen[candidates.index, 0].nonzero().squeeze(1)
        owner, row = (of[candidates.index] for of in (_owner_of_token(planner), planner.row_of_token))
        lies_with = candidates.index[_even_choice(candidates, ranks, owner)]
        of_rows = planner.of_tokens(ChosenTokens.of(chosen, global_rows).rows, lies_with)
        kv_heads = planner.share.local_heads.kv
        is_alone = torch.equal(of_rows.tokens_by_owner, torch.arange(len(ranks))[None])
        return _KnownRows(
            among=mechanism.among().plan(of_rows),
            ranks=DeviceCopies(ranks),
            first_place=DeviceCopies(torch.where(row < 0, -1 - kv_heads, row * kv_heads)),
            owners=None if is_alone else RowOwners.of(of_rows, owner),
        )

    def prepare(self, spec: InputSpec) -> None:
        for table in (self.ranks, self.first_place):
            table.on(spec.device)
        if self.owners is not None:
            self.owners.prepare(spec.device)
        self.among.prepare(spec)

    def select(self, scores: Tensor, first: Tensor) -> SelectedRows:
        """Return the selected rows by scores of candidates, float32 `[tokens, Hk]`, and the first of each document."""
        return self.of_taken(best_in_groups(scores.t(), first, self.ranks.on(scores.device)))

    def of_taken(self, taken: Tensor) -> SelectedRows:
        """Return the rows of the candidates that each head takes, ascending, int64 `[Hk, rows]`."""
        device, kv_heads = taken.device, len(taken)
        place = (self.first_place.on(device)[taken] + torch.arange(kv_heads, device=device)[:, None]).t()  # [rows, Hk]
        if self.owners is not None:
            return self.owners.exchange(self.among, taken.t(), place)
        source = place.flatten()  # [rows x Hk]
        return SelectedRows(among=self.among, source=source, slots=None, rows=len(place), heads=kv_heads)


def _owner_of_token(planner: AttentionPlanner) -> Tensor:
    """Return the owner of each token of the planner's sequence, int64 `[tokens]`."""
    number, nth = (planner.tokens_by_owner >= 0).nonzero(as_tuple=True)
    owner = torch.empty(len(planner.global_rows), dtype=torch.int64)
    owner[planner.tokens_by_owner[number, nth]] = number
    return owner


def _even_choice(candidates: "Candidates", ranks: Tensor, owner: Tensor) -> Tensor:
    """Return as many candidates as are taken, ascending, evenly spaced among those of each owner, int64 `[n]`.

    ranks: as of `_KnownRows`. owner: of each candidate, int64 `[tokens]`.
    """
    first, end, by_owner = candidates.first, candidates.end, owner.argsort(stable=True)
    # The part of its document that is taken is added up, token by token: each time that it passes a half, one is.
    part = first[ranks].bincount(minlength=len(first))[first] / (end - first + 1).double()
    halves = torch.arange(len(ranks)) + 0.5
    return by_owner[torch.searchsorted(part[by_owner].cumsum(0), halves)].sort().values


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
    candidates: Candidates
    known_rows: _KnownRows | None
    _candidates: dict[torch.device, Candidates] = field(default_factory=dict, init=False)

    def prepare(self, spec: InputSpec) -> None:
        self.planner.prepare_all_rows(spec.device)
        self._candidates_on(spec.device)
        if self.known_rows is not None:
            self.known_rows.prepare(spec)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, routing = inputs
        selected, kv_heads = kept(lambda: self._select(routing)), k.shape[1]
        part, saved = selected.among.forward(*selected.collect(kv_heads, q, k, v))
        (gates,) = selected.collect(kv_heads, routing)  # [rows, KV heads of a row, 1]
        # The product is in the accumulation dtype, which routing comes in.
        gated = (_by_group(part, gates) * gates.sigmoid().unsqueeze(-1)).to(part.dtype).flatten(1, 2)
        (out,) = selected.scatter(kv_heads, (gated, q.shape))
        return out, Saved((part, gates, *saved.tensors), (selected, q.shape[:2], k.shape[:2], saved.extras))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        part, gates, *tensors = saved.tensors
        selected, of_queries, of_keys, extras = saved.extras
        kv_heads, weight = of_keys[1], gates.sigmoid()
        (dout,) = selected.collect(kv_heads, dout)
        dout = _by_group(dout, gates).to(gates.dtype)
        # out = w part with w = sigmoid(gate), so that dgate = (dout . part) w (1 - w).
        dgates = (dout * _by_group(part, gates)).sum(dim=(2, 3)).unsqueeze(-1) * weight * (1 - weight)
        dpart = (dout * weight.unsqueeze(-1)).to(part.dtype).flatten(1, 2)
        gradients = selected.among.backward(dpart, Saved(tuple(tensors), extras))
        if selected.planner is not None:
            # They may be parts of sums over ranks, which are rounded once, and travel with those of routing.
            gradients = [x.to(gates.dtype) for x in gradients]
        shapes = of_queries, of_keys, of_keys, of_keys
        return tuple(selected.scatter(kv_heads, *zip((*gradients, dgates), shapes, strict=True)))

    def lse(self, saved: Saved) -> Tensor | None:
        """-inf at tokens that are not selected."""
        selected, of_queries, of_keys, extras = saved.extras
        lse = selected.among.lse(Saved(saved.tensors[2:], extras))
        return selected.scatter(of_keys[1], (lse.unsqueeze(-1), of_queries), fill=float("-inf"))[0].squeeze(-1)

    def composition(self, sizes: Sizes, routing: RoutingSource) -> Composition:
        heads = self.planner.share.local_heads
        # q, k, v and out of a selected token and KV head, with its group.
        group = heads.query // heads.kv
        of_pair = (group + 1) * sizes.kv_width * sizes.element_bytes
        selected = self._by_routing(routing())
        sent, received = selected.sent, selected.received
        # q, k, v and routing go and out returns; back, the gradient of out goes and theirs return.
        out = group * sizes.value_dim * sizes.element_bytes
        going = of_pair - out + sizes.accumulation_bytes
        gradients = (group * sizes.head_dim + sizes.kv_width + 1) * sizes.accumulation_bytes
        return Composition(
            branches=((selected.among, no_routing),),
            all_reduced=(len(self.planner.global_rows) * heads.kv * torch.float32.itemsize, 0),
            exchanged=(
                [leave * going + come * out for leave, come in zip(sent, received, strict=True)],
                [leave * out + come * gradients for leave, come in zip(sent, received, strict=True)],
            ),
            # The rows, what is packed for them and what has come.
            working_bytes=(selected.rows * selected.heads + sum(sent) + sum(received)) * of_pair,
        )

    def _by_routing(self, routing: Routing) -> SelectedRows:
        """Return the rows that were selected in a full sequence."""
        assert isinstance(routing, TokenRouting), "what is sent depends on the tokens that heads select"
        if self.known_rows is None:
            return self._planned(routing.chosen)
        candidates = self._candidates_on(routing.chosen.device)
        # [tokens, Hk] -> [Hk, tokens] -> [Hk, rows]
        taken = routing.chosen[candidates.index].t().nonzero()[:, 1].view(routing.chosen.shape[1], -1)
        return self.known_rows.of_taken(taken)

    def _select(self, routing: Tensor) -> SelectedRows:
        logits = self.planner.all_rows(routing[..., 0].float(), kind="choice")  # [tokens, Hk]
        candidates = self._candidates_on(logits.device)
        if self.known_rows is None:
            return self._planned(self.mechanism.choose(logits, candidates))
        return self.known_rows.select(self.mechanism.scores(logits, candidates), candidates.first)

    def _planned(self, chosen: Tensor) -> SelectedRows:
        """Plan attention among the tokens `chosen`, bool `[tokens, Hk]`, for which the host waits."""
        selected = ChosenTokens.of(chosen.cpu(), self.planner.global_rows)
        of_group, device = _planner_of(selected, self.planner), chosen.device
        place = self.planner.row_of_token[selected.token] * chosen.shape[1] + selected.head
        real = of_group.tokens >= 0
        slots = None if bool(real.all()) else copy_to(real.nonzero().squeeze(1), device)
        return SelectedRows(
            among=self.mechanism.among().plan(of_group),
            source=copy_to(place[of_group.tokens[real]], device),
            slots=slots,
            rows=len(real),
            heads=1,
        )

    def _candidates_on(self, device: torch.device) -> Candidates:
        """Return the candidates on `device`, where they are copied once for all layers."""
        return once(self._candidates, device, lambda: self.candidates.to(device))


def _by_group(x: Tensor, gates: Tensor) -> Tensor:
    """Return `[rows, KV heads, G, width]` of x `[rows, KV heads x G, width]`; gates `[rows, KV heads, 1]`."""
    return x.unflatten(1, (gates.shape[1], -1))
