"""Rows that KV heads select of a sequence, collected from their tokens, and scattered back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.planner import AttentionPlanner, SequenceAttention


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowOwners:
    """Who has the tokens that heads select from, and who the rows of those that are selected; all owners know it.

    planner: of the rows. of_token: the owner of each candidate's token, int64 `[tokens]`. rows: of each owner, int64
    `[P, T]`, -1 for padding; local: this one's.
    """

    planner: AttentionPlanner
    of_token: DeviceCopies
    rows: DeviceCopies
    local: DeviceCopies

    @staticmethod
    def of(planner: AttentionPlanner, of_token: Tensor) -> "RowOwners":
        rows, local = planner.tokens_by_owner, planner.tokens
        return RowOwners(
            planner=planner, of_token=DeviceCopies(of_token), rows=DeviceCopies(rows), local=DeviceCopies(local)
        )

    def prepare(self, device: torch.device) -> None:
        for table in (self.of_token, self.rows, self.local):
            table.on(device)

    def exchange(self, among: SequenceAttention, taken: Tensor, place: Tensor) -> "SelectedRows":
        """Plan the exchange of the candidates that heads take in each row, int64 `[rows, Hk]`.

        place: token * Hk + head among the local ones, negative if another owner has the token, int64 `[rows, Hk]`.
        """
        device, owners = taken.device, self.rows.host.shape[0]
        # Padding, -1, finds what is put behind all others: [rows, Hk] -> [P, T, Hk] and [T, Hk]
        place = _with_none(place)[self.rows.on(device)]
        owner = _with_none(self.of_token.on(device)[taken])[self.local.on(device)]
        # Whether a pair of each owner's rows leaves from here; whether one of the rows here comes from each owner.
        leaves = place.flatten(1) >= 0  # [P, T x Hk]
        comes = owner.flatten() == torch.arange(owners, device=device)[:, None]  # [P, T x Hk]
        # The only time that the host waits: [2, P, T x Hk] -> [2, P]
        sent, received = torch.stack((leaves, comes)).sum(dim=2).cpu().tolist()
        # Both sides have the pairs of two owners in the order of rows, then of heads.
        leaving = leaves.flatten().nonzero_static(size=sum(sent)).squeeze(1)
        return SelectedRows(
            among=among,
            source=place.flatten()[leaving],
            slots=comes.nonzero_static(size=sum(received))[:, 1],
            rows=owner.shape[0],
            heads=owner.shape[1],
            sent=sent,
            received=received,
            planner=self.planner,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SelectedRows:
    """Attention among selected rows, and the pairs of a token and a KV head behind them, each of which occurs once.

    source: of each pair of local tokens, token * Hk + head, int64 `[pairs]`. slots: of each pair of the rows here,
    row * heads + head, int64 `[pairs]`, the others being padding; None if these are all, in order. rows, heads: how
    many rows are here, and KV heads of each. sent, received: how many pairs go to and come from each owner, this one
    included. planner: of the rows; None where these lie with their tokens.
    """

    among: SequenceAttention
    source: Tensor
    slots: Tensor | None
    rows: int
    heads: int
    sent: Sequence[int] = ()
    received: Sequence[int] = ()
    planner: AttentionPlanner | None = None

    def collect(self, kv_heads: int, *tensors: Tensor) -> list[Tensor]:
        """Return the rows `[rows, heads x G, width]` of x `[T, Hk x G, width]`; padding is 0.

        Tensors of one dtype, which go to other owners in one message.
        """
        # [T, Hk x G, width] -> [T x Hk, G, width] -> [pairs, G, width]
        pairs = [x.unflatten(1, (kv_heads, -1)).flatten(0, 1).index_select(0, self.source) for x in tensors]
        pairs = self._move(pairs, self.sent, self.received)
        if self.slots is not None:
            size = self.rows * self.heads
            pairs = [x.new_zeros(size, *x.shape[1:]).index_copy_(0, self.slots, x) for x in pairs]
        # [rows x heads, G, width] -> [rows, heads x G, width]
        return [x.unflatten(0, (self.rows, self.heads)).flatten(1, 2) for x in pairs]

    def scatter(self, kv_heads: int, *given: tuple[Tensor, Sequence[int]], fill: float = 0.0) -> list[Tensor]:
        """Return `[T, Hk x G, width]` of each x as collected and the first two of this shape; the rest is `fill`."""
        # [rows, heads x G, width] -> [rows x heads, G, width] -> [pairs, G, width]
        pairs = [x.unflatten(1, (self.heads, -1)).flatten(0, 1) for x, _ in given]
        if self.slots is not None:
            pairs = [x.index_select(0, self.slots) for x in pairs]
        scattered = []
        for x, (_, (tokens, *_)) in zip(self._move(pairs, self.received, self.sent), given, strict=True):
            full = x.new_full((tokens * kv_heads, *x.shape[1:]), fill).index_copy_(0, self.source, x)
            # [T x Hk, G, width] -> [T, Hk x G, width]
            scattered.append(full.unflatten(0, (tokens, kv_heads)).flatten(1, 2))
        return scattered

    def _move(self, pairs: list[Tensor], sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        """Exchange pairs `[sum(sent), G, width]` for those that come, `[sum(received), G, width]`, in one message."""
        if self.planner is None:
            return pairs
        # [pairs, G, width] -> [pairs, G x width], side by side, and back
        packed = torch.cat([x.flatten(1) for x in pairs], dim=1)
        moved = self.planner.all_to_all(packed, sent=sent, received=received, kind="selected")
        parts = moved.split([x.shape[1:].numel() for x in pairs], dim=1)
        return [part.unflatten(1, x.shape[1:]) for part, x in zip(parts, pairs, strict=True)]


def _with_none(x: Tensor) -> Tensor:
    """Return x `[rows, Hk]` with one more row, of -1."""
    return torch.nn.functional.pad(x, (0, 0, 0, 1), value=-1)
