"""Expert parallelism: tokens travel to the ranks that hold their experts, and the outputs of the experts back.

Rank r of P holds the experts [r E/P, (r+1) E/P). Example: 2 ranks, 4 experts, K = 2 experts of a token, rank 0 with the
tokens a and b, which choose (3, 0) and (1, 3); rank 1 sends it one row for expert 1, of its token c:

    dispatch   rank 0 sorts its choices by expert: a->0, b->1 stay, a->3, b->3 go to rank 1    choice 1 2 | 0 3
    experts    rank 0 has rows a b c, by expert: 0 has 1 row, 1 has 2                          counts 1 2
    combine    the outputs travel back; out[a] = w[a, 0] expert_3(a) + w[a, 1] expert_0(a)

A token sums its outputs in the accumulation dtype and in the order of its choices, so results do not depend on the
layout. Each row for another rank is sent twice in both passes of a layer, plus 8 bytes for each expert and rank.
Between ranks the host has to know how many rows travel, for which it waits for the device once in a layer. A single
rank has the experts of all its tokens: it takes a row of each choice, whose number is known, and those of dropped
choices, behind all others, are neither read nor used. Where experts choose tokens, it waits for the number of rows too.
What a layer plans serves the pass that recomputes it: 16 bytes for each choice, 8 more for each row between ranks.
Legend: T local tokens, C width, E experts, K experts of a token, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.recomputation import kept
from farspan.parallel.comm import Channel, Transfer

Experts = Callable[[Tensor, Tensor], Tensor]
"""From rows `[N, C]` sorted by this rank's experts, and the number of rows of each, int64 `[E/P]`, to rows `[N, C]`."""


def send_to_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    dispatched: Tensor,
    channel: Channel,
    experts: int,
    *,
    ragged: bool = False,
) -> "InFlightTokens":
    """Start sending a row of each token to each expert that it chose; computation until `combine` overlaps.

    x `[T, C]`; chosen int64 and weights `[T, K]`; dispatched bool `[T, K]`, False for choices that are dropped, such as
    those of padding. experts: in all, a multiple of the ranks. ragged: few choices are dispatched, those of a token its
    first ones, so that columns without any are left out. Every rank of the channel has to call it. Gradients
    reach x, weights and the parameters of the experts; their transfers overlap with the backward pass of the
    computation.
    """
    dispatch = kept(lambda: Dispatch.plan(chosen, dispatched, channel, experts, ragged=ragged))
    weights = weights[:, : dispatch.row.shape[1]]
    exchange = _RowExchange(channel, dispatch.sent, dispatch.received, "expert_rows")
    link: Tensor = _Start.apply(_Expand.apply(x, dispatch), exchange)  # pyright: ignore[reportAssignmentType]
    return InFlightTokens(link, weights, dispatch, exchange)


@dataclass(frozen=True, slots=True, eq=False)
class InFlightTokens:
    """Rows of tokens in flight to their experts; link: the autograd edge back to them."""

    link: Tensor
    weights: Tensor
    dispatch: "Dispatch"
    exchange: "_RowExchange"

    def combine(self, run: Experts) -> Tensor:
        """Run the experts; return the weighted sum of each token's outputs, `[T, C]` in the dtype of x."""
        dispatch, exchange = self.dispatch, self.exchange
        rows: Tensor = _Finish.apply(self.link, exchange)  # pyright: ignore[reportAssignmentType]
        if dispatch.by_expert is None:
            outputs = run(rows, dispatch.counts)
        else:
            # [N, C] by sender -> by expert -> by sender
            outputs = run(rows.index_select(0, dispatch.by_expert), dispatch.counts)
            outputs = outputs.index_select(0, dispatch.by_expert.argsort())
        back = _RowExchange(exchange.channel, dispatch.received, dispatch.sent, "expert_out")
        outputs = _Finish.apply(_Start.apply(outputs, back), back)
        return _Combine.apply(outputs, self.weights, dispatch)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dispatch:
    """The routes of a rank's tokens in one layer.

    choice: the choice t * K + k behind each sent row, int64 `[N sent]`, by expert, then by token. row: the sent row of
    each choice, int64 `[T, K]`; -1 if it is dropped. sent, received: rows to and from each rank.
    counts: rows of each of this rank's experts, int64 `[E/P]`. by_expert: permutation of the received rows from the
    order of arrival to that of experts, int64 `[N]`; None if they arrive in it.
    """

    choice: Tensor
    row: Tensor
    sent: list[int]
    received: list[int]
    counts: Tensor
    by_expert: Tensor | None

    @staticmethod
    @torch.no_grad()
    def plan(chosen: Tensor, dispatched: Tensor, channel: Channel, experts: int, *, ragged: bool) -> "Dispatch":
        """Exchange the numbers of rows with the other ranks, if there are any; see the module for when it waits."""
        # Dropped choices sort behind all experts: [T, K] -> [T * K].
        expert, choice = chosen.masked_fill(~dispatched, experts).flatten().sort(stable=True)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=chosen.device)
        counts = counts.scatter_add_(0, expert, torch.ones_like(expert))[:experts]
        row = torch.empty_like(choice).index_copy_(0, choice, torch.arange(len(choice), device=choice.device))
        row = row.view(chosen.shape).masked_fill_(~dispatched, -1)  # [T * K] -> [T, K]
        if channel.size == 1 and not ragged:
            rows = [len(choice)]
            return Dispatch(choice=choice, row=row, sent=rows, received=rows, counts=counts, by_expert=None)
        counts_sent = counts.view(channel.size, -1)  # [E] -> [P, E/P]
        counts_received = channel.all_to_all(counts_sent, kind="expert_counts")  # [P, E/P]
        columns = dispatched.any(dim=0).sum()
        # The only synchronization with the device.
        numbers = torch.cat((counts_sent.sum(1), counts_received.sum(1), columns[None])).tolist()
        sent, received = numbers[: channel.size], numbers[channel.size : -1]
        if ragged:
            # [T, K] with fewer columns, one at least.
            row = row[:, : max(numbers[-1], 1)]
            choice = choice // chosen.shape[1] * row.shape[1] + choice % chosen.shape[1]
        local_expert = torch.arange(counts_received.shape[1], device=choice.device).repeat(channel.size)  # [P * E/P]
        # [P * E/P] -> [N received]
        expert_of_arrival = local_expert.repeat_interleave(counts_received.flatten(), output_size=sum(received))
        return Dispatch(
            choice=choice[: sum(sent)],
            row=row,
            sent=sent,
            received=received,
            counts=counts_received.sum(0),
            by_expert=expert_of_arrival.argsort(stable=True),
        )

    def combine(self, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Return the sum of each token's rows `[N, C]`, weighted by `[T, K]`; `[T, C]` in the accumulation dtype."""
        dropped, dtype = self.row < 0, accumulation_dtype(rows.dtype)
        row = self.row.masked_fill(dropped, 0)
        weights = (~dropped).to(dtype) if weights is None else weights.to(dtype).masked_fill(dropped, 0.0)
        total = torch.zeros(len(row), rows.shape[1], dtype=dtype, device=rows.device)
        # One choice of all tokens at a time: the sum has a fixed order, and memory for one row of each token.
        for k in range(row.shape[1] if len(rows) else 0):
            # A dropped choice reads another token's row, which may be NaN: a weight of 0 would not hide it.
            of_choice = rows.index_select(0, row[:, k]).masked_fill_(dropped[:, k, None], 0.0)
            total.addcmul_(of_choice, weights[:, k, None])
        return total


class _Expand(torch.autograd.Function):
    """From tokens `[T, C]` to a row of each choice `[N, C]`; backward, gradients are summed in the order of choices."""

    @staticmethod
    def forward(ctx, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x.index_select(0, dispatch.choice // dispatch.row.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatch.combine(drows, None).to(drows.dtype), None


@dataclass(slots=True, eq=False)
class _RowExchange:
    """An all-to-all of rows, one transfer in flight at a time; gradients travel in the opposite direction."""

    channel: Channel
    sent: list[int]
    received: list[int]
    kind: str
    in_flight: Transfer | None = None

    def start(self, rows: Tensor) -> None:
        self.in_flight = self.channel.start_all_to_all(rows, sent=self.sent, received=self.received, kind=self.kind)

    def start_backward(self, gradients: Tensor) -> None:
        self.in_flight = self.channel.start_all_to_all(
            gradients, sent=self.received, received=self.sent, kind=f"{self.kind}_gradient"
        )

    def finish(self) -> Tensor:
        """Wait for the transfer in flight and return its rows."""
        assert self.in_flight is not None
        arrived, self.in_flight = self.in_flight.wait(), None
        return arrived


# Autograd sees a transfer as two functions, so that it runs other nodes between them in both passes. The empty tensor
# between `_Start` and `_Finish`, and its gradient, only order the calls.


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, exchange: _RowExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.start(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, link: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.finish(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, link: Tensor, exchange: _RowExchange) -> Tensor:
        ctx.exchange = exchange
        # A channel of one rank returns the very tensor that was sent, which is part of the graph already.
        return exchange.finish().detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, drows: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.exchange.start_backward(drows)
        return drows.new_empty(0), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.save_for_backward(outputs, weights)
        ctx.dispatch = dispatch
        return dispatch.combine(outputs, weights).to(outputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        outputs, weights = ctx.saved_tensors
        choice, per_token = ctx.dispatch.choice, weights.shape[1]
        # [T, C] -> [N, C], a row of each sent choice
        dout_rows = dout.index_select(0, choice // per_token).to(accumulation_dtype(outputs.dtype))
        of_rows = (dout_rows * outputs).sum(-1).to(weights.dtype)
        dweights = weights.new_zeros(weights.numel()).index_copy_(0, choice, of_rows).view_as(weights)  # [T * K]
        dweights.masked_fill_(ctx.dispatch.row < 0, 0.0)
        doutputs = dout_rows.mul_(weights.flatten()[choice].unsqueeze(-1)).to(outputs.dtype)  # weights [N, 1]
        return doutputs, dweights, None
