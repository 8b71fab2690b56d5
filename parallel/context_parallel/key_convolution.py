"""The key convolution over a sharded sequence: each rank fetches its halo, the rows of others just before its own.

Keys travel in their dtype, gradients in the accumulation dtype; the sum of the gradients is rounded once.
Example: 8 tokens on 2 ranks, each token reads 1 row before it (reach 1):

    contiguous   rank 0: 0 1 2 3, rank 1: 4 5 6 7    rank 1 reads 3: the end of one neighbor's rows
    zigzag       rank 0: 0 1 6 7, rank 1: 2 3 4 5    rank 1 reads 1, rank 0 reads 5: of up to two neighbors
    striped      rank 0: 0 2 4 6, rank 1: 1 3 5 7    each reads all rows of as many ranks as the reach
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.layers.key_convolution import Taps, convolve, convolve_backward, earlier_rows
from farspan.kernels.masks.rows import Rows
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeyConvolution:
    """Planned for one sharded sequence and a width; serves every layer."""

    channel: Channel
    halo: "Halo"
    taps: Taps

    @staticmethod
    def plan(channel: Channel, shards: Shards, width: int, device: torch.device | str = "cpu") -> "KeyConvolution":
        """Plan for `width` taps; every rank of the channel plans the same sequence. Index maps are on `device`."""
        if shards.degree != channel.size:
            raise ValueError(f"a sequence sharded over {shards.degree} ranks cannot be convolved on {channel.size}")
        halo = Halo.plan(shards, channel.rank, width - 1)
        halo.leaving.on(torch.device(device))
        taps = Taps.build(shards.rows_of(channel.rank), halo.rows, width)
        return KeyConvolution(channel=channel, halo=halo, taps=taps.to(torch.device(device)))

    def __call__(self, k: Tensor, weight: Tensor) -> Tensor:
        """Return the convolved keys of k `[tokens_local, Hk, D]`, in its dtype; weight `[width, Hk, D]`.

        Differentiable; the gradient of the weight is this rank's part of it. Raises ValueError on other shapes.
        """
        return _KeyConvolutionFunction.apply(self, k, weight)  # pyright: ignore[reportReturnType]


class _KeyConvolutionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planned: KeyConvolution, k: Tensor, weight: Tensor) -> Tensor:
        halo = planned.halo.fetch(k, planned.channel, kind="halo")
        ctx.save_for_backward(k, halo, weight)
        ctx.planned = planned
        return convolve(k, halo, weight, planned.taps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, halo, weight = ctx.saved_tensors
        dk, dhalo, dweight = convolve_backward(dout, k, halo, weight, ctx.planned.taps)
        ctx.planned.halo.return_gradients_(dk, dhalo, ctx.planned.channel, kind="halo_gradient")
        return None, dk.to(k.dtype), dweight.to(weight.dtype)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Halo:
    """The rows that one rank reads from the others and sends to them, planned for one sharded sequence.

    rows: the halo, from rank 0 first. leaving: int64, the local rows that other ranks read, those to rank 0 first; a
    row may go to several ranks. sent, received: rows to and from each rank. is_empty: no rank reads from another.
    """

    rows: Rows
    leaving: DeviceCopies
    sent: tuple[int, ...]
    received: tuple[int, ...]
    is_empty: bool

    @staticmethod
    def plan(shards: Shards, rank: int, reach: int) -> "Halo":
        """Plan for the rows up to `reach` positions before those of `rank`, in their documents."""
        reader, token, slot = _transfers(shards, reach)
        owner, degree = slot // shards.tokens_local, shards.degree
        reads, sends = reader == rank, owner == rank
        # Transfers are sorted by token, so sender and reader list the rows between them in the same order.
        arriving = token[reads][owner[reads].argsort(stable=True)]
        return Halo(
            rows=shards.rows.take(arriving),
            leaving=DeviceCopies(slot[sends] % shards.tokens_local),
            sent=tuple(reader[sends].bincount(minlength=degree).tolist()),
            received=tuple(owner[reads].bincount(minlength=degree).tolist()),
            is_empty=not len(token),
        )

    def fetch(self, x: Tensor, channel: Channel, *, kind: str) -> Tensor:
        """Return the halo `[len(rows), ...]` of x `[tokens_local, ...]`; every rank has to call."""
        outgoing = x[self.leaving.on(x.device)]
        if self.is_empty:
            return outgoing
        return channel.start_all_to_all(outgoing, sent=self.sent, received=self.received, kind=kind).wait()

    def return_gradients_(self, dx: Tensor, dhalo: Tensor, channel: Channel, *, kind: str) -> None:
        """Send the gradient of the halo to its owners, and add the received gradients to `dx` `[tokens_local, ...]`."""
        if self.is_empty:
            return
        arrived = channel.start_all_to_all(dhalo, sent=self.received, received=self.sent, kind=kind).wait()
        # Rank by rank: indexed addition drops duplicates, and one rank sends the gradient of a row once.
        for rows, part in zip(self.leaving.on(dx.device).split(self.sent), arrived.split(self.sent), strict=True):
            dx[rows] += part


def mean_rows_sent(shards: Shards, reach: int) -> int:
    """Return how many rows a rank sends, the mean over ranks, rounded up."""
    return -(-len(_transfers(shards, reach)[0]) // shards.degree)


def _transfers(shards: Shards, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all transfers by reader, then by token, int64: the rank that reads, the token, and the token's slot."""
    slots = shards.slots()
    owner = slots // shards.tokens_local
    source = earlier_rows(shards.rows, shards.rows, reach)
    reader = owner.expand(reach, -1)  # [tokens] -> [reach, tokens]
    remote = (source >= 0) & (owner[source.clamp(min=0)] != reader)
    # One number per pair of reader and token: a row is sent to a rank once, however many of its rows read it.
    num_tokens = max(len(shards.rows), 1)
    transfers = (reader[remote] * len(shards.rows) + source[remote]).unique()
    token = transfers % num_tokens
    return transfers // num_tokens, token, slots[token]
