"""Ring attention (arXiv 2310.01889): keys and values travel around the ranks while queries stay.

    step 0        step 1        step P-1      rank r attends to its own chunk first, then to the chunk of rank r-1,
    r: chunk r    chunk r-1  …  chunk r+1     r-2, …; the next chunk is on its way during the work on this one.

In the backward pass the chunks make the same journey, followed one step behind by the sum of their gradients, which
needs one hop more to be home. Sums over chunks are float32 (float64 for float64 inputs), on the wire too.
"""

from typing import final

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.planner import HeadShare
from farspan.parallel.context_parallel.moving_kv import KVMovingStrategy
from farspan.parallel.context_parallel.ring_exchange import RingKVSchedule, Rings
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards


@final
class Ring(KVMovingStrategy):
    """One ring, for every layout."""

    name = "ring"

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> RingKVSchedule:
        rings = Rings(size=self.channel.size, width=self.channel.size)
        return RingKVSchedule(self, rings, attention_mask, shards, share)


STRATEGIES.add(Ring.name, Ring)
