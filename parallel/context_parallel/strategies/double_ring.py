"""Double ring (LoongTrain, arXiv 2406.18485, section 4.3): rings within neighbourhoods, within a ring of those.

Chunks go round among the ranks of a neighbourhood, such as the GPUs of a node, while the chunk that a rank began with
is on its way to the next neighbourhood: the slow links between nodes have the time of a whole inner round for one
chunk, and all of a node's links are used at once. Bytes are those of one ring.
"""

from typing import final

from farspan.kernels.mechanism import Heads, Masked, Mechanism
from farspan.parallel.context_parallel.moving_kv import TravellingKeys
from farspan.parallel.context_parallel.ring_exchange import RingJourney, Rings
from farspan.parallel.context_parallel.strategy import STRATEGIES, HeadShare, refusal_of_grid
from farspan.parallel.layout import Shards


@final
class DoubleRing(TravellingKeys):
    """Neighbourhoods are the inner axis of the channel."""

    name = "double_ring"

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return super().refusal(mechanism, heads, degree, inner) or refusal_of_grid(cls.name, degree, inner)

    def route(self, mechanism: Masked, shards: Shards, share: HeadShare) -> RingJourney:
        rings = Rings(size=self.channel.size, width=self.channel.width)
        return RingJourney(self, rings, mechanism, shards, share)


STRATEGIES.add(DoubleRing.name, DoubleRing)
