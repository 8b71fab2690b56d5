"""Gather: every rank collects the keys and values of all ranks, then attends to them at once.

One collective instead of a ring's hops, and the largest calls of the attention kernel; memory for the whole sequence's
keys and values while a layer is computed. The backward pass collects them again; gradients go home by an all-to-all
and are summed there in the accumulation dtype, rank by rank, so that their sum does not depend on who was faster.
"""

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from farspan.kernels.mechanism import Heads, Masked, Mechanism
from farspan.kernels.plan import Plan
from farspan.parallel.choice import volume_of_choice
from farspan.parallel.comm import Channel
from farspan.parallel.dealt import Homeward, Journey, KeysAndValues, plan_travelling_keys, refusal_of_travelling_keys
from farspan.parallel.layout import Shards
from farspan.parallel.strategy import STRATEGIES, Attend, AttentionShape, Strategy, Volume


@final
class Gather(Strategy):
    """All-gather of keys and values, for any layout and any numbers of heads."""

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int) -> str | None:
        return refusal_of_travelling_keys("gather", mechanism)

    @classmethod
    def volume(cls, shape: AttentionShape, degree: int) -> Volume:
        """A rank's keys and values to (P-1) others, forward and backward; (P-1) gradients of others' go home.

        What a choice is made from, or learnt from, is summed over all ranks: 2 (P-1)/P of its bytes.
        """
        collected = (degree - 1) * shape.kv_elements * shape.element_bytes
        gradients = (degree - 1) * shape.kv_elements * shape.accumulation_bytes
        choice, learning = (volume_of_choice(degree, x) for x in (shape.total_bytes, shape.gradient_total_bytes))
        return Volume(forward=collected + choice, backward=collected + gradients + learning)

    def _plan(self, mechanism: Mechanism, shards: Shards, heads: Heads, *, backend: str) -> Attend:
        return plan_travelling_keys("gather", _GatherJourney, mechanism, shards, heads, self.channel, backend=backend)


@final
class _GatherJourney(Journey):
    """One part: the rows of all ranks, set end to end."""

    def __init__(self, mechanism: Masked, shards: Shards, heads: Heads, channel: Channel) -> None:
        self.channel = channel
        everywhere = shards.index.flatten()
        keys, queries = shards.rows.take(everywhere), shards.rows_of(channel.rank)
        self.plans = (Plan.build(queries, keys, mechanism.visibility(), heads=heads.query),)
        self.tokens = (everywhere,)

    def parts(self, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        mine = KeysAndValues.pack(k, v)
        chunks = [mine.like(buffer) for buffer in self.channel.all_gather(mine.buffer, kind="gather_kv")]
        yield torch.cat([chunk.key for chunk in chunks]), torch.cat([chunk.value for chunk in chunks])

    def homeward(self, k: Tensor, v: Tensor) -> Homeward:
        return _GatherHomeward(self.channel, KeysAndValues.zeros(k, v))


@final
class _GatherHomeward(Homeward):
    """Each rank's part of the gradients goes to it; those that arrive are summed in the order of the ranks."""

    def __init__(self, channel: Channel, gradient: KeysAndValues) -> None:
        self.channel, self.gradient = channel, gradient
        self.found: Tensor | None = None

    def add(self, dk: Tensor | None, dv: Tensor | None) -> None:
        if dk is not None and dv is not None:
            by_rank = (
                x.to(self.gradient.buffer.dtype).unflatten(0, (self.channel.size, -1)).flatten(1) for x in (dk, dv)
            )
            self.found = torch.cat(tuple(by_rank), dim=1)

    def arrive(self) -> tuple[Tensor, Tensor]:
        found = self.gradient.buffer.expand(self.channel.size, -1) if self.found is None else self.found
        total = self.gradient.like(self.channel.all_to_all(found, kind="gather_dkv").sum(dim=0))
        return total.key, total.value


STRATEGIES.add("gather", Gather)
