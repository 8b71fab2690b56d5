"""Ring attention (arXiv 2310.01889): keys and values travel around the ranks while queries stay.

    step 0        step 1        step P-1      rank r attends to its own chunk first, then to the chunk of rank r-1,
    r: chunk r    chunk r-1  …  chunk r+1     r-2, …; the next chunk is on its way during the work on this one.

In the backward pass the chunks make the same journey, followed one step behind by the sum of their gradients, which
needs one hop more to be home. Sums over chunks are float32 (float64 for float64 inputs), on the wire too.
"""

from typing import final

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.parallel.dealt import plan_travelling_keys, refusal_of_travelling_keys
from farspan.parallel.layout import Shards
from farspan.parallel.rings import RingJourney, Rings
from farspan.parallel.strategy import STRATEGIES, Attend, HeadShare, Strategy


@final
class Ring(Strategy):
    """One ring, for every layout."""

    stand_in = "state"

    @classmethod
    def refusal(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return refusal_of_travelling_keys("ring", mechanism)

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> Attend:
        rings = Rings(size=self.channel.size, width=self.channel.size)
        journey = RingJourney.planner("ring", rings, self.channel, rounded=self.rounded_gradients)
        return plan_travelling_keys("ring", journey, mechanism, shards, share, self.channel, backend=backend)


STRATEGIES.add("ring", Ring)
