"""Expert parallelism: rows of chosen tokens go to the ranks that hold their experts, and what these make of them back.

Rank r of P holds the experts [r E/P, (r+1) E/P). A rank sorts its choices by expert, ranks tell each other how many
they send, rows travel in one uneven all-to-all there and one back, and each token adds up what came back, weighed, in
the accumulation dtype and in the order of its choices: nothing depends on how tokens are dealt. Both passes of a layer
send each row that leaves its rank twice, and 8 bytes for each expert and rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.merge import accumulation_dtype
from farspan.parallel.comm import Channel, Transfer

Experts = Callable[[Tensor, Sequence[int]], Tensor]
"""From rows `[N, C]` sorted by this rank's experts, and how many each has, to rows `[N, C]`."""


def send_to_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, kept: Tensor, channel: Channel, experts: int
) -> "RowsUnderWay":
    """Start sending a row of each token to each expert that it chose; what is computed next does so meanwhile.

    x `[T, C]`; chosen int64 and weights `[T, K]`; kept bool `[T, K]`, False for choices that go nowhere, such as those
    of padding. experts: in all, a multiple of the ranks. Every rank of the channel has to call it. Gradients reach x,
    weights and what experts use; on their way back they travel during the backward pass of what was computed meanwhile.
    """
    dispatch = Dispatch.plan(chosen, kept, channel, experts)
    there = _Exchange(channel, dispatch.sent, dispatch.received, "expert_rows")
    link: Tensor = _Start.apply(_Spread.apply(x, dispatch), there)  # pyright: ignore[reportAssignmentType]
    return RowsUnderWay(link, weights, dispatch, there)


@dataclass(frozen=True, slots=True, eq=False)
class RowsUnderWay:
    """Rows of tokens on their way to their experts; link: the edge of the graph that leads back to them."""

    link: Tensor
    weights: Tensor
    dispatch: "Dispatch"
    there: "_Exchange"

    def attended_by(self, run: Experts) -> Tensor:
        """Return the weighed sum of what its experts make of each token, `[T, C]` in the dtype of x; 0 without any."""
        dispatch, there = self.dispatch, self.there
        rows: Tensor = _Land.apply(self.link, there)  # pyright: ignore[reportAssignmentType]
        made = run(rows.index_select(0, dispatch.by_expert), dispatch.counts).index_select(0, dispatch.by_arrival)
        back = _Exchange(there.channel, dispatch.received, dispatch.sent, "expert_out")
        made = _Land.apply(_Start.apply(made, back), back)
        return _Collect.apply(made, self.weights, dispatch)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dispatch:
    """Where the rows of a rank's tokens go in one layer.

    choice: of each row sent, the choice t * K + k of token t that it is for, int64 `[N]`, by expert and token. place:
    the row of each choice, int64 `[T, K]`; -1 where none is sent. sent, received: rows to and from each rank.
    counts: rows that each of this rank's experts gets; by_expert: rows in the order of arrival to be taken for that
    order, and by_arrival back.
    """

    choice: Tensor
    place: Tensor
    sent: list[int]
    received: list[int]
    counts: list[int]
    by_expert: Tensor
    by_arrival: Tensor

    @staticmethod
    @torch.no_grad()
    def plan(chosen: Tensor, kept: Tensor, channel: Channel, experts: int) -> "Dispatch":
        """Tell the other ranks of the channel how many rows come; the host waits for the device once."""
        # What goes nowhere is sorted behind all experts.
        expert, choice = chosen.masked_fill(~kept, experts).flatten().sort(stable=True)
        mine = torch.zeros(experts + 1, dtype=torch.int64, device=chosen.device)
        mine = mine.scatter_add_(0, expert, torch.ones_like(expert))[:experts].view(channel.size, -1)
        theirs = channel.all_to_all(mine, kind="expert_counts")
        to_ranks, from_ranks = torch.stack((mine, theirs)).tolist()
        sent, received = [sum(row) for row in to_ranks], [sum(row) for row in from_ranks]
        place = torch.empty_like(choice)
        place[choice] = torch.arange(len(choice), device=choice.device)
        local = torch.arange(theirs.shape[1], device=choice.device).repeat(channel.size)
        of_arrival = local.repeat_interleave(theirs.flatten(), output_size=sum(received))
        by_expert = of_arrival.argsort(stable=True)
        return Dispatch(
            choice=choice[: sum(sent)],
            place=place.masked_fill_(place >= sum(sent), -1).view(chosen.shape),
            sent=sent,
            received=received,
            counts=[sum(column) for column in zip(*from_ranks, strict=True)],
            by_expert=by_expert,
            by_arrival=by_expert.argsort(),
        )

    def collect(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Return for each token the sum of its rows, weighed by `[T, K]`, in the dtype of sums; `[T, C]`."""
        dtype = accumulation_dtype(rows.dtype)
        total = torch.zeros(len(self.place), rows.shape[1], dtype=dtype, device=rows.device)
        for k in range(self.place.shape[1] if len(rows) else 0):
            part = rows.index_select(0, self.place[:, k].clamp(min=0)).to(dtype)
            share = (self.place[:, k] >= 0).to(dtype)
            total.addcmul_(part, (share if weights is None else share * weights[:, k])[:, None])
        return total


class _Spread(torch.autograd.Function):
    """A row for each choice; backward, a token's gradients are summed in the order of its choices."""

    @staticmethod
    def forward(ctx, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x.index_select(0, dispatch.choice // dispatch.place.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatch.collect(drows, None).to(drows.dtype), None


class _Exchange:
    """Rows to and from the ranks of a channel, one transfer under way at a time; gradients take the way back."""

    def __init__(self, channel: Channel, sent: list[int], received: list[int], kind: str) -> None:
        self.channel = channel
        self._sent, self._received, self._kind = sent, received, kind
        self._transfer: Transfer | None = None

    def start(self, rows: Tensor) -> None:
        self._begin(rows, self._sent, self._received, self._kind)

    def start_back(self, gradients: Tensor) -> None:
        self._begin(gradients, self._received, self._sent, f"{self._kind}_gradient")

    def land(self) -> Tensor:
        """Return what arrives of what was started."""
        assert self._transfer is not None
        arrived, self._transfer = self._transfer.wait(), None
        return arrived

    def _begin(self, rows: Tensor, sent: list[int], received: list[int], kind: str) -> None:
        self._transfer = self.channel.start_all_to_all(rows, sent=sent, received=received, kind=kind)


class _Start(torch.autograd.Function):
    """What goes from here to `_Land`, and the gradient from there to here, only makes autograd call them in turn."""

    @staticmethod
    def forward(ctx, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, link: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.land(), None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        # Alone on a channel, rows arrive as the very tensor that left, which has a history.
        return exchange.land().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, drows: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.exchange.start_back(drows)
        return drows.new_empty(0), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, made: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(made, weights)
        ctx.dispatch = dispatch
        return dispatch.collect(made, weights).to(made.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        made, weights = ctx.saved_tensors
        choice, per_token = ctx.dispatch.choice, weights.shape[1]
        of_rows = dout.index_select(0, choice // per_token).to(accumulation_dtype(made.dtype))
        dweights = torch.zeros_like(weights)
        dweights.view(-1)[choice] = (of_rows * made).sum(-1).to(weights.dtype)
        dmade = of_rows.mul_(weights.flatten()[choice].unsqueeze(-1)).to(made.dtype)
        return dmade, dweights, None
