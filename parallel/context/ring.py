"""Ring attention (arXiv 2310.01889): keys and values travel around the ranks while queries stay.

    step 0        step 1        step P-1      rank r attends to its own chunk first, then to the chunk of rank r-1,
    r: chunk r    chunk r-1  …  chunk r+1     r-2, …; the next chunk is on its way during the work on this one.

In the backward pass the chunks make the same journey, followed one step behind by the sum of their gradients, which
needs one hop more to be home. Sums over chunks are float32 (float64 for float64 inputs), on the wire too.
"""

from collections.abc import Iterator
from typing import final

from torch import Tensor

from farspan.kernels.mechanism import Heads, Masked, Mechanism
from farspan.kernels.plan import Plan
from farspan.parallel.choice import volume_of_choice
from farspan.parallel.comm import Channel, Shift
from farspan.parallel.dealt import (
    Homeward,
    Journey,
    KeysAndValues,
    plan_travelling_keys,
    refusal_of_travelling_keys,
)
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, Attend, AttentionShape, Strategy, Volume

CHUNK_TAG, GRADIENT_TAG = 1, 2


@final
class Ring(Strategy):
    """One ring for every layout."""

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int) -> str | None:
        return refusal_of_travelling_keys("ring", mechanism)

    @classmethod
    def volume(cls, shape: AttentionShape, degree: int) -> Volume:
        """Forward (P-1) hops of a chunk; backward the same and P hops of its gradient in the accumulation dtype.

        What a choice is made from, or learnt from, is summed over all ranks: 2 (P-1)/P of its bytes.
        """
        if degree == 1:
            return Volume(forward=0, backward=0)
        chunks = (degree - 1) * shape.kv_elements * shape.element_bytes
        gradients = degree * shape.kv_elements * shape.accumulation_bytes
        choice, learning = (volume_of_choice(degree, x) for x in (shape.total_bytes, shape.gradient_total_bytes))
        return Volume(forward=chunks + choice, backward=chunks + gradients + learning)

    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        return plan_travelling_keys("ring", _RingJourney, mechanism, shards, heads, self.channel, backend=backend)


@final
class _RingJourney(Journey):
    """One part per step: the chunk that is here at that step."""

    def __init__(self, mechanism: Masked, shards: Shards, heads: Heads, channel: Channel) -> None:
        self.channel = channel
        owners = [(channel.rank - step) % channel.size for step in range(channel.size)]
        queries, visibility = shards.rows_of(channel.rank), mechanism.visibility()
        self.plans = tuple(
            Plan.build(queries, shards.rows_of(owner), visibility, heads=heads.query) for owner in owners
        )
        self.tokens = tuple(shards.index[owner] for owner in owners)

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        chunk = KeysAndValues.pack(k, v)
        for _ in self.plans[1:]:
            shift = self.channel.shift(chunk.buffer, kind="ring_kv", tag=CHUNK_TAG)
            yield chunk.key, chunk.value
            chunk = chunk.like(shift.wait())
        yield chunk.key, chunk.value

    def homeward(self, k: Tensor, v: Tensor) -> Homeward:
        return _RingHomeward(self.channel, KeysAndValues.zeros(k, v))


@final
class _RingHomeward(Homeward):
    """The gradient of a chunk follows it, one step behind; it needs one hop more to be home."""

    def __init__(self, channel: Channel, gradient: KeysAndValues) -> None:
        self.channel, self.gradient = channel, gradient
        self.arriving: Shift | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        # The gradient of this chunk comes from the previous rank, which had the chunk one step ago.
        self.arrive()
        if dk is not None and dv is not None:
            self.gradient.key.add_(dk)
            self.gradient.value.add_(dv)
        if self.channel.size > 1:
            self.arriving = self.channel.shift(self.gradient.buffer, kind="ring_dkv", tag=GRADIENT_TAG)

    def arrive(self) -> tuple[Tensor, Tensor]:
        if self.arriving is not None:
            self.gradient, self.arriving = self.gradient.like(self.arriving.wait()), None
        return self.gradient.key, self.gradient.value


STRATEGIES.add("ring", Ring)
