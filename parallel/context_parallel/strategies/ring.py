"""Ring attention (arXiv 2310.01889): keys and values pass around the ranks while queries stay.

    step 0        step 1        step P-1      rank r attends to its own chunk first, then to the chunk of rank r-1,
    r: chunk r    chunk r-1  …  chunk r+1     r-2, …; the next chunk travels while it attends to this one.

Double ring (LoongTrain, arXiv 2406.18485, section 4.3): chunks pass around the ranks of a node group, such as the GPUs
of a node, while the chunk that a rank began with travels to the next group: the slow links between nodes have the time
of a full inner round for one chunk, and all links of a node are used at once. It sends the bytes of one ring.

P ranks are a grid of P/W node groups of W; a single ring has W = P. At step o W + i, rank r has the chunk of the rank
o groups and i members before it. Example: 4 ranks, two node groups of 2; each cell names the chunk on a rank:

                 group A         group B
    step       rank 0  rank 1  rank 2  rank 3
    0            0       1       2       3      send on: to the other group, ready at step 2; and to the neighbor
    1            1       0       3       2      from the neighbor, by the fast links of the node
    2            2       3       0       1      chunks of step 0 from the other group, over two steps of attention
    3            3       2       1       0      from the neighbor

Backward, chunks make the same trip again. Sums are float32 (float64 for float64 inputs). The gradient of chunk 0 is
found on ranks 0, 1, 2, 3 in turn:

    trailing ("accumulation")   one sum follows its chunk a step behind, 0 -> 1 -> 2 -> 3, and one more hop to rank 0
    direct   ("compute")        ranks 1, 2, 3 each send their part, rounded once, straight to rank 0, which sums them
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, RoutingSource, Sizes
from farspan.parallel.comm import Channel, Transfer
from farspan.parallel.context_parallel.moving_kv import (
    Gradients,
    GradReturn,
    KeysAndValues,
    KVMovingStrategy,
    KVSchedule,
)
from farspan.parallel.context_parallel.strategy import STRATEGIES, Move, ShardedPlanner, grid_unsupported_reason

# A single ring sends both in one process group; a gradient must not be taken for a chunk.
CHUNK_TAG, GRADIENT_TAG = 1, 2


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
class Ring(KVMovingStrategy):
    """One ring, for every layout."""

    name = "ring"

    def kv_schedule(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVSchedule:
        size = self.channel.size
        return _RingKVSchedule(planner, attention_mask, RingTopology(size=size, inner_size=size))


@final
class DoubleRing(KVMovingStrategy):
    """Node groups are the inner axis of the channel."""

    name = "double_ring"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return super().unsupported_reason(mechanism, heads, degree, inner) or grid_unsupported_reason(
            cls.name, degree, inner
        )

    def kv_schedule(self, planner: ShardedPlanner, attention_mask: AttentionMask) -> KVSchedule:
        size, inner_size = self.channel.size, self.channel.inner_size
        return _RingKVSchedule(planner, attention_mask, RingTopology(size=size, inner_size=inner_size))


@final
class _RingKVSchedule(KVSchedule):
    """One part per step: the chunk that the rank has at that step."""

    def __init__(self, planner: ShardedPlanner, attention_mask: AttentionMask, ring: RingTopology) -> None:
        self.ring, shards, rank = ring, planner.shards, planner.strategy.channel.rank
        super().__init__(
            planner, attention_mask, [shards.index[ring.owner_at(rank, step)] for step in range(ring.size)]
        )

    def kv_parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        chunk = KeysAndValues.pack(k, v)
        next_chunk = next_round = None
        # Process groups of their own: NCCL sends all of a group in the order posted, so that an inner hop would wait
        # for the outer one before it. Either way a chunk goes to the next rank of the group.
        inner, outer = (self.channel, None) if self.ring.rounds == 1 else (self.channel.inner, self.channel.outer)
        for step in range(self.ring.size):
            if next_chunk is not None:
                chunk = chunk.like(next_chunk.wait())
            starts_round = step % self.ring.inner_size == 0
            if starts_round and step + self.ring.inner_size < self.ring.size:
                # The slow links have the time of a full round for this chunk.
                next_round = self._send_chunk(chunk, outer)
            ends_round = (step + 1) % self.ring.inner_size == 0
            next_chunk = next_round if ends_round else self._send_chunk(chunk, inner)
            yield chunk.key, chunk.value

    def _send_chunk(self, chunk: KeysAndValues, channel: Channel | None) -> Transfer:
        assert channel is not None, "a double ring runs on a grid of ranks"
        return channel.shift(chunk.buffer, kind=f"{self.strategy.name}_kv", tag=CHUNK_TAG)

    def grad_return(self, k: Tensor, v: Tensor) -> GradReturn:
        return (_DirectGradReturn if self.strategy.rounds_gradients else _TrailingGradReturn)(self, k, v)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource) -> tuple[Move, ...]:
        """Forward P-1 hops of a chunk; backward the same, and the gradient of a chunk: P hops of a sum, or P-1 direct.

        With node groups, the inner ring has the hops within rounds, W-1 of each W.
        """
        size, inner_size, rounds = self.ring.size, self.ring.inner_size, self.ring.rounds
        if size == 1:
            return ()
        direct = self.strategy.rounds_gradients
        chunk = self.kv_rows * sizes.kv_width
        gradient = chunk * self.gradient_bytes(sizes)

        def move(chunks: int, gradients: int, channel: Channel) -> Move:
            sent = chunks * chunk * sizes.element_bytes
            return Move(forward=sent, backward=sent + gradients * gradient, channel=channel, overlapped=True)

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


class _RingGradReturn(GradReturn):
    """step: the number of the next part."""

    arriving: Transfer | None = None

    def __init__(self, kv_schedule: _RingKVSchedule, k: Tensor, v: Tensor) -> None:
        super().__init__(kv_schedule, k, v)
        self.ring, self.rank, self.step = kv_schedule.ring, kv_schedule.channel.rank, 0
        self.kind = f"{kv_schedule.strategy.name}_dkv"

    def _shift(self, buffer: Tensor, *, to: int, source: int) -> None:
        self.arriving = self.channel.gradients.shift(buffer, kind=self.kind, tag=GRADIENT_TAG, to=to, source=source)


@final
class _TrailingGradReturn(_RingGradReturn):
    """The sum of gradients follows its chunk one step behind, and takes one more hop to its owner."""

    def add(self, gradients: Gradients) -> None:
        # The sum so far comes from the rank that had this chunk one step ago.
        self.receive()
        self._add_local(gradients)
        ring, rank, step = self.ring, self.rank, self.step
        if ring.size > 1:
            # After the last step a rank receives the sum of its own chunk.
            next_owner = ring.owner_at(rank, step + 1) if step + 1 < ring.size else rank
            to = ring.rank_with_chunk(ring.owner_at(rank, step), step + 1)
            self._shift(self.total.buffer, to=to, source=ring.rank_with_chunk(next_owner, step))
        self.step += 1

    def receive(self) -> None:
        if self.arriving is not None:
            self.total, self.arriving = self.total.like(self.arriving.wait()), None


@final
class _DirectGradReturn(_RingGradReturn):
    """Each rank sends its gradient, rounded once, to the owner of the chunk, which sums them in the order of steps."""

    def add(self, gradients: Gradients) -> None:
        if self.step == 0:
            self._add_local(gradients)
        else:
            self.receive()
            # The owner waits for a message all the same.
            dk, dv = gradients or (torch.zeros_like(self.total.key), torch.zeros_like(self.total.value))
            packed = KeysAndValues.pack(dk.to(self.comm_dtype), dv.to(self.comm_dtype)).buffer
            to, source = self.ring.owner_at(self.rank, self.step), self.ring.rank_with_chunk(self.rank, self.step)
            self._shift(packed, to=to, source=source)
        self.step += 1

    def receive(self) -> None:
        if self.arriving is not None:
            self.total.buffer.add_(self.arriving.wait())
            self.arriving = None


for strategy in (Ring, DoubleRing):
    STRATEGIES.add(strategy.name, strategy)
