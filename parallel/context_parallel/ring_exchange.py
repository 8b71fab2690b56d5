"""Ring exchange: chunks of keys and values pass from rank to rank, around one ring or around rings of node groups.

P ranks are a grid of P/W node groups of W; a single ring has W = P. At step o W + i, rank r has the chunk of the rank
o groups and i members before it. Example: 4 ranks, two node groups of 2; each cell names the chunk on a rank:

                 group A         group B
    step       rank 0  rank 1  rank 2  rank 3
    0            0       1       2       3      send on: to the other group, ready at step 2; and to the neighbor
    1            1       0       3       2      from the neighbor, by the fast links of the node
    2            2       3       0       1      chunks of step 0 from the other group, over two steps of attention
    3            3       2       1       0      from the neighbor

Backward, chunks make the same trip again. The gradient of chunk 0 is found on ranks 0, 1, 2, 3 in turn:

    trailing ("accumulation")   one sum follows its chunk a step behind, 0 -> 1 -> 2 -> 3, and one more hop to rank 0
    direct   ("compute")        ranks 1, 2, 3 each send their part, rounded once, straight to rank 0, which sums them
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planner import HeadShare, RoutingSource, Sizes
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel, GradCommDtype, Transfer
from farspan.parallel.context_parallel.moving_kv import GradReturn, KeysAndValues, KVMovingStrategy, KVSchedule
from farspan.parallel.context_parallel.strategy import Move, Volume
from farspan.parallel.layout import Shards

# Transfers of one tag keep their order; a chunk for the next round must not be taken for one of this round.
INNER_TAG, OUTER_TAG, GRADIENT_TAG = 1, 2, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RingTopology:
    """size: all ranks, P. inner_size: ranks of a node group, W, which divides P."""

    size: int
    inner_size: int

    @property
    def rounds(self) -> int:
        """Rounds within node groups, one for each group."""
        return self.size // self.inner_size

    def shifted(self, rank: int, groups: int, members: int) -> int:
        """Return the rank that is `groups` groups and `members` members of a group after `rank`, around both rings."""
        group, member = divmod(rank, self.inner_size)
        return (group + groups) % self.rounds * self.inner_size + (member + members) % self.inner_size

    def owner_at(self, rank: int, step: int) -> int:
        """Return the owner of the chunk that `rank` has at a step."""
        groups, members = divmod(step, self.inner_size)
        return self.shifted(rank, -groups, -members)

    def rank_with_chunk(self, owner: int, step: int) -> int:
        """Return the rank that has the chunk of `owner` at a step; after the last step, `owner` itself."""
        groups, members = divmod(step, self.inner_size)
        return self.shifted(owner, groups, members) if step < self.size else owner


@final
class RingKVSchedule(KVSchedule):
    """One KV block per step: the chunk that the rank has at that step."""

    def __init__(
        self,
        strategy: KVMovingStrategy,
        ring: RingTopology,
        attention_mask: AttentionMask,
        shards: Shards,
        share: HeadShare,
    ) -> None:
        self.name, self.channel, self.ring = strategy.name, strategy.channel, ring
        self.grad_comm_dtype: GradCommDtype = strategy.grad_comm_dtype
        self.kv_rows = shards.tokens_local * share.local_heads.kv
        rank = strategy.channel.rank
        owners = [ring.owner_at(rank, step) for step in range(ring.size)]
        queries = shards.rows_of(rank)
        self.plans = tuple(
            Plan.build(queries, shards.rows_of(owner), attention_mask, heads=share.local_heads.query)
            for owner in owners
        )
        self.tokens = tuple(shards.index[owner] for owner in owners)

    def kv_blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        chunk = KeysAndValues.pack(k, v)
        next_chunk = next_round = None
        for step in range(self.ring.size):
            if next_chunk is not None:
                chunk = chunk.like(next_chunk.wait())
            starts_round = step % self.ring.inner_size == 0
            if starts_round and step + self.ring.inner_size < self.ring.size:
                # The slow links have the time of a full round for this chunk.
                next_round = self._send_chunk(chunk, groups=1, members=0, tag=OUTER_TAG)
            ends_round = (step + 1) % self.ring.inner_size == 0
            next_chunk = next_round if ends_round else self._send_chunk(chunk, groups=0, members=1, tag=INNER_TAG)
            yield chunk.key, chunk.value

    def _send_chunk(self, chunk: KeysAndValues, *, groups: int, members: int, tag: int) -> Transfer:
        to, source = (self.ring.shifted(self.channel.rank, sign * groups, sign * members) for sign in (1, -1))
        return self.channel.shift(chunk.buffer, kind=f"{self.name}_kv", tag=tag, to=to, source=source)

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        gradient = KeysAndValues.no_gradients(k, v)
        if self.grad_comm_dtype == "compute":
            return _DirectGradReturn(self, gradient, k.dtype)
        return _TrailingGradReturn(self, gradient)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Forward P-1 hops of a chunk; backward the same, and the gradient of a chunk: P hops of a sum, or P-1 direct.

        With node groups, the inner ring has the hops within rounds, W-1 of each W.
        """
        size, inner_size, rounds = self.ring.size, self.ring.inner_size, self.ring.rounds
        if size == 1:
            return ()
        direct = self.grad_comm_dtype == "compute"
        chunk = self.kv_rows * sizes.kv_width
        gradient = chunk * sizes.gradient_bytes(rounded=self.grad_comm_dtype == "compute")

        def move(chunks: int, gradients: int, channel: Channel) -> Move:
            sent = chunks * chunk * sizes.element_bytes
            return Move(Volume(forward=sent, backward=sent + gradients * gradient), channel, overlapped=True)

        if self.channel.inner is None or rounds == 1:
            return (move(size - 1, size - 1 if direct else size, self.channel),)
        # A direct gradient crosses groups unless its owner is in the same group.
        inner_gradients = inner_size - 1 if direct else size - rounds
        outer_gradients = size - inner_size if direct else rounds
        return (
            move(size - rounds, inner_gradients, self.channel.inner),
            move(rounds - 1, outer_gradients, self.channel),
        )

    def working_bytes(self, sizes: Sizes, routing: RoutingSource) -> int:
        """The chunk in use, one arriving per ring; gradients: the sum, one arriving, and that of this step."""
        rings = 1 if self.ring.rounds == 1 else 2
        chunks = (1 + rings) * sizes.element_bytes + 3 * sizes.accumulation_bytes
        return self.kv_rows * sizes.kv_width * chunks


@final
class _TrailingGradReturn(GradReturn):
    """The sum of gradients follows its chunk one step behind, and takes one more hop to its owner."""

    def __init__(self, kv_schedule: RingKVSchedule, gradient: KeysAndValues) -> None:
        self.kv_schedule, self.gradient, self.step = kv_schedule, gradient, 0
        self.arriving: Transfer | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        # The sum so far comes from the rank that had this chunk one step ago.
        self.finish()
        if dk is not None and dv is not None:
            self.gradient.key.add_(dk)
            self.gradient.value.add_(dv)
        ring, channel, step = self.kv_schedule.ring, self.kv_schedule.channel, self.step
        if ring.size > 1:
            # After the last step a rank receives the sum of its own chunk.
            next_owner = ring.owner_at(channel.rank, step + 1) if step + 1 < ring.size else channel.rank
            self.arriving = channel.shift(
                self.gradient.buffer,
                kind=f"{self.kv_schedule.name}_dkv",
                tag=GRADIENT_TAG,
                to=ring.rank_with_chunk(ring.owner_at(channel.rank, step), step + 1),
                source=ring.rank_with_chunk(next_owner, step),
            )
        self.step += 1

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.arriving is not None:
            self.gradient, self.arriving = self.gradient.like(self.arriving.wait()), None
        return self.gradient.key, self.gradient.value


@final
class _DirectGradReturn(GradReturn):
    """Each rank sends its gradient, rounded once, to the owner of the chunk, which sums them in the order of steps."""

    def __init__(self, kv_schedule: RingKVSchedule, gradient: KeysAndValues, comm_dtype: torch.dtype) -> None:
        self.kv_schedule, self.gradient, self.comm_dtype, self.step = kv_schedule, gradient, comm_dtype, 0
        self.arriving: Transfer | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        if dk is None or dv is None:
            # The owner waits for a message all the same.
            dk, dv = torch.zeros_like(self.gradient.key), torch.zeros_like(self.gradient.value)
        if self.step == 0:
            self.gradient.key.add_(dk)
            self.gradient.value.add_(dv)
        else:
            self.finish()
            ring, channel = self.kv_schedule.ring, self.kv_schedule.channel
            self.arriving = channel.shift(
                KeysAndValues.pack(dk.to(self.comm_dtype), dv.to(self.comm_dtype)).buffer,
                kind=f"{self.kv_schedule.name}_dkv",
                tag=GRADIENT_TAG,
                to=ring.owner_at(channel.rank, self.step),
                source=ring.rank_with_chunk(channel.rank, self.step),
            )
        self.step += 1

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.arriving is not None:
            self.gradient.buffer.add_(self.arriving.wait())
            self.arriving = None
        return self.gradient.key, self.gradient.value
