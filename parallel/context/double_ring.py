"""Double ring (LoongTrain, arXiv 2406.18485, section 4.3): rings within neighbourhoods, within a ring of those.

Chunks go round among the ranks of a neighbourhood, such as the GPUs of a node, while the chunk that a rank began with
is on its way to the next neighbourhood: the slow links between nodes have the time of a whole inner round for one
chunk, and all of a node's links are used at once. Bytes are those of one ring.
"""

from typing import final

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.parallel.dealt import plan_travelling_keys, refusal_of_travelling_keys
from farspan.parallel.layout import Shards
from farspan.parallel.rings import RingJourney, Rings
from farspan.parallel.strategy import STRATEGIES, Attend, HeadShare, Strategy, refusal_of_grid


@final
class DoubleRing(Strategy):
    """Neighbourhoods are the inner axis of the channel."""

    stand_in = "state"

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return refusal_of_travelling_keys("double_ring", mechanism) or refusal_of_grid("double_ring", degree, inner)

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> Attend:
        rings = Rings(size=self.channel.size, width=self.channel.width)
        journey = RingJourney.planner("double_ring", rings, self.channel, rounded=self.rounded_gradients)
        return plan_travelling_keys("double_ring", journey, mechanism, shards, share, self.channel, backend=backend)


STRATEGIES.add("double_ring", DoubleRing)
