"""Double ring (LoongTrain, arXiv 2406.18485, section 4.3): rings within node groups, within a ring of groups.

Chunks pass around the ranks of a node group, such as the GPUs of a node, while the chunk that a rank began with travels
to the next group: the slow links between nodes have the time of a full inner round for one chunk, and all links of a
node are used at once. It sends the bytes of one ring.
"""

from typing import final

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads, HeadShare
from farspan.parallel.context_parallel.moving_kv import KVMovingStrategy
from farspan.parallel.context_parallel.ring_exchange import RingKVSchedule, RingTopology
from farspan.parallel.context_parallel.strategy import STRATEGIES, grid_unsupported_reason
from farspan.parallel.layout import Shards


@final
class DoubleRing(KVMovingStrategy):
    """Node groups are the inner axis of the channel."""

    name = "double_ring"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return super().unsupported_reason(mechanism, heads, degree, inner) or grid_unsupported_reason(
            cls.name, degree, inner
        )

    def kv_schedule(self, attention_mask: AttentionMask, shards: Shards, share: HeadShare) -> RingKVSchedule:
        ring = RingTopology(size=self.channel.size, inner_size=self.channel.inner_size)
        return RingKVSchedule(self, ring, attention_mask, shards, share)


STRATEGIES.add(DoubleRing.name, DoubleRing)
