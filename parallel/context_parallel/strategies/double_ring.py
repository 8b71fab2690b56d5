"""Double ring (LoongTrain, arXiv 2406.18485, section 4.3): rings within neighborhoods, within a ring of those.

Chunks go round among the ranks of a neighborhood, such as the GPUs of a node, while the chunk that a rank began with
is on its way to the next neighborhood: the slow links between nodes have the time of a whole inner round for one
chunk, and all of a node's links are used at once. Bytes are those of one ring.
"""

from typing import final

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare
from farspan.parallel.context_parallel.moving_kv import KVMovingStrategy
from farspan.parallel.context_parallel.ring_exchange import RingKVSchedule, Rings
from farspan.parallel.context_parallel.strategy import STRATEGIES, grid_unsupported_reason
from farspan.parallel.layout import Shards


@final
class DoubleRing(KVMovingStrategy):
    """Neighborhoods are the inner axis of the channel."""

    name = "double_ring"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return super().unsupported_reason(mechanism, heads, degree, inner) or grid_unsupported_reason(
            cls.name, degree, inner
        )

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> RingKVSchedule:
        rings = Rings(size=self.channel.size, width=self.channel.width)
        return RingKVSchedule(self, rings, attention_mask, shards, share)


STRATEGIES.add(DoubleRing.name, DoubleRing)
