"""Head exchange: an all-to-all turns each rank's tokens of all heads into all tokens of its heads, and back.

Example: 4 query heads a b c d, 2 KV heads x (of a b) and y (of c d), 2 ranks with two tokens each:

                before: its tokens, all heads          after: all tokens, its heads
    rank 0      tokens 0 1 of a b c d, x y             tokens 0 1 2 3 of a b, x
    rank 1      tokens 2 3 of a b c d, x y             tokens 0 1 2 3 of c d, y

The output takes the way back. With fewer KV heads than ranks, each KV head is sent to all ranks whose query heads share
it (4 ranks: x to ranks 0 and 1), and its owner sums the gradients of these replicas in the accumulation dtype.
Legend: P ranks, T local tokens, D stands for any head dim.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import InputSpec, RoutingSource, Saved, Sizes, no_routing
from farspan.parallel.comm import Channel
from farspan.parallel.context_parallel.strategy import DistributedAttention, Move, Queries


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowPermutation:
    """A permutation of rows and its inverse; both None for the identity, which costs no copy."""

    order: DeviceCopies | None
    inverse: DeviceCopies | None

    @staticmethod
    def of(order: Tensor) -> "RowPermutation":
        if torch.equal(order, torch.arange(len(order))):
            return RowPermutation(None, None)
        return RowPermutation(DeviceCopies(order), DeviceCopies(order.argsort()))

    def prepare(self, device: torch.device) -> None:
        """Copy both to `device`."""
        for index in (self.order, self.inverse):
            if index is not None:
                index.on(device)

    def apply(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self.order.on(x.device)]

    def undo(self, x: Tensor) -> Tensor:
        return x if self.inverse is None else x[self.inverse.on(x.device)]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class HeadParallelAttention(DistributedAttention):
    """Attention to the tokens of all ranks of a channel, each with some of the heads.

    head_axis: these ranks, P. permutation: from their rows set end to end to the rows of `attention`, which is that of
    one rank, with its heads, after the exchange.
    """

    head_axis: Channel
    permutation: RowPermutation
    attention: DistributedAttention

    def prepare(self, spec: InputSpec) -> None:
        self.permutation.prepare(spec.device)
        self.attention.prepare(replace(spec, kv_heads=self.attention.heads.kv))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        by_rank = [_heads_by_rank(x, self.head_axis.size) for x in inputs]  # [T, H, D] -> [T, P, H/P, D]
        exchanged = self._gather_tokens(by_rank[:3], kind="qkv")
        # Routing has the accumulation dtype, so it is a message of its own.
        exchanged += self._gather_tokens(by_rank[3:], kind="routing")
        out, saved = self.attention.forward(*exchanged)
        (out,) = self._scatter_tokens([out], kind="out")
        return out.flatten(1, 2), saved  # [T, P, H/P, D] -> [T, H, D]

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        (global_dout,) = self._gather_tokens([_heads_by_rank(dout, self.head_axis.size)], kind="dout")
        gradients = list(self.attention.backward(global_dout, saved))
        # Freed, and gradients popped, as early as possible: each has all tokens of the sequence.
        del global_dout
        comm_dtype = accumulation_dtype(dout.dtype) if self._sums_replicas else dout.dtype
        (dq,) = self._scatter_tokens([gradients.pop(0).to(dout.dtype)], kind="dq")
        kv_gradients = self._scatter_tokens([gradients.pop(0).to(comm_dtype) for _ in ("dk", "dv")], kind="dkv")
        kv_gradients += self._scatter_tokens(gradients, kind="drouting")
        # [T, P, H/P, D] -> [T, H, D]
        return dq.flatten(1, 2), *(_sum_replicas(gradient, self.heads.kv) for gradient in kv_gradients)

    def lse(self, saved: Saved) -> Tensor | None:
        lse = self.attention.lse(saved)
        if lse is None:
            return None
        (lse,) = self._scatter_tokens([lse.unsqueeze(-1)], kind="lse")  # [P * T, H/P] -> [T, P, H/P, 1]
        return lse.flatten(1)  # [T, H]

    @property
    def _sums_replicas(self) -> bool:
        """Whether replicas of KV heads have gradients that travel in the accumulation dtype."""
        return self.head_axis.size > self.heads.kv and not self.planner.strategy.rounds_gradients

    def _gather_tokens(self, tensors: list[Tensor], *, kind: str) -> list[Tensor]:
        """From this rank's tokens of all heads `[T, P, H/P, D]` to all tokens of its heads `[P * T, H/P, D]`.

        One message for all tensors; the result is in the order of `attention`.
        """
        if not tensors:
            return []
        shapes = [x.shape[2:] for x in tensors]
        packed = tensors[0].new_empty(self.head_axis.size, self.tokens_local, sum(shape.numel() for shape in shapes))
        for view, x in zip(_split_heads(packed, shapes), tensors, strict=True):
            view.copy_(x.transpose(0, 1))  # [T, P, H/P, D] -> [P, T, H/P, D]
        received = self.head_axis.all_to_all(packed, kind=f"{self.planner.strategy.name}_{kind}")
        del packed
        return _split_heads(self.permutation.apply(received.flatten(0, 1)), shapes)  # [P, T, …] -> [P * T, …]

    def _scatter_tokens(self, tensors: list[Tensor], *, kind: str) -> list[Tensor]:
        """From all tokens of this rank's heads `[P * T, H/P, D]` to its tokens of all heads `[T, P, H/P, D]`.

        Empties the list, so that tensors are freed once they are packed.
        """
        if not tensors:
            return []
        shapes = [x.shape[1:] for x in tensors]
        packed = tensors[0].new_empty(self.head_axis.size * self.tokens_local, sum(shape.numel() for shape in shapes))
        for view in _split_heads(packed, shapes):
            view.copy_(self.permutation.undo(tensors.pop(0)))
        by_rank = packed.unflatten(0, (self.head_axis.size, -1))  # [P * T, …] -> [P, T, …]
        received = self.head_axis.all_to_all(by_rank, kind=f"{self.planner.strategy.name}_{kind}").transpose(
            0, 1
        )  # [T, P, …]
        return _split_heads(received, shapes)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """Each way (P-1)/P of q, k, v, routing and out, with max(Hk, P) KV heads, and the moves of `attention`."""
        degree, elements = self.head_axis.size, sizes.element_bytes
        queries = self.heads.query * sizes.kv_width * elements
        keys = max(self.heads.kv, degree) * sizes.kv_width
        routing_bytes = max(self.heads.kv, degree) * self.routing_width * sizes.accumulation_bytes
        gradients = keys * (sizes.accumulation_bytes if self._sums_replicas else elements)
        forward, backward = (
            (degree - 1) * (self.tokens_local * (queries + key_bytes + routing_bytes) // degree)
            for key_bytes in (keys * elements, gradients)
        )
        exchanged = Move(forward=forward, backward=backward, channel=self.head_axis)
        return exchanged, *self.attention.moves(sizes, self._of_share(routing))

    @property
    def queries(self) -> Queries:
        return self.attention.queries

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """q, k, v, out and, backward, their accumulated gradients, for all tokens of this rank's heads."""
        local, tokens = self.attention.heads, self.head_axis.size * self.tokens_local
        width = (local.query + local.kv) * sizes.kv_width * (sizes.element_bytes + sizes.accumulation_bytes)
        return tokens * width + self.attention.working_bytes(sizes, self._of_share(routing))

    def _of_share(self, routing: RoutingSource) -> RoutingSource:
        """Return the routing of this rank's heads."""
        return lambda: routing().of_heads(self.attention.planner.share)


def _split_heads(packed: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Return views of a packed buffer, `[…, sum of heads x D]` -> one `[…, heads, D]` per shape (heads, D)."""
    views = packed.split([shape.numel() for shape in shapes], dim=-1)
    return [view.unflatten(-1, shape) for view, shape in zip(views, shapes, strict=True)]


def _heads_by_rank(x: Tensor, degree: int) -> Tensor:
    """Group the heads by rank; with fewer heads than ranks, neighboring ranks get replicas."""
    # [T, H, D] -> [T, max(H, P), D] -> [T, P, H/P, D]
    return x.repeat_interleave(max(degree // x.shape[1], 1), dim=1).unflatten(1, (degree, -1))


def _sum_replicas(gradient: Tensor, heads: int) -> Tensor:
    """Sum the gradients of replicas: `[T, P, heads per rank, D]` -> `[T, heads, D]`."""
    if heads >= gradient.shape[1]:
        return gradient.flatten(1, 2)  # no replicas
    gradient = gradient.flatten(1, 2).to(accumulation_dtype(gradient.dtype))  # [T, P, 1, D] -> [T, P, D]
    return gradient.unflatten(1, (heads, -1)).sum(dim=2)  # [T, P, D] -> [T, Hk, P/Hk, D] -> [T, Hk, D]
