"""Ship: queries travel to the ranks that hold the keys they chose, and partial results come back.

For routed mechanisms, whose queries choose few blocks: at many ranks less moves than if all keys went round, about when
degree - 1 > (Hq / Hk) x (ranks that a query needs), times what a query and its result weigh over a key and its value.
Queries are sent one head at a time, to each rank that holds rows of a chosen block that the query sees; their local
part is computed meanwhile. Results are merged in float32, rank by rank. Backward, queries are sent again with the
gradient of out, out and the log-sum-exp; gradients of keys stay where these are: there is nothing to round on the way.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward
from farspan.kernels.kinds.routed import SelectedBlocks
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Access, Mechanism
from farspan.kernels.merge import accumulation_dtype, merge_
from farspan.kernels.planner import Heads, KeyRouting, Routing, RoutingSource, Saved, Sizes, no_routing
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Channel, Transfer
from farspan.parallel.context_parallel.query_dispatch import BlockOwners, DispatchPlan, ReceivedQueries
from farspan.parallel.context_parallel.strategy import (
    STRATEGIES,
    DistributedAttention,
    Move,
    Queries,
    ShardedPlanner,
    Strategy,
    Volume,
    all_reduce_move,
)
from farspan.parallel.layout import Shards

ITEM_BYTES, ENTRY_BYTES, COUNT_BYTES = 12, 4, 16
"""Of an item: its token, head and number of blocks; of a block's number; of what a rank says to another beforehand."""


@final
class Ship(Strategy):
    """For routed mechanisms alone; works under every layout and any numbers of heads."""

    name, serves, fallback_strategy = "ship", frozenset({Access.BLOCKS}), "state"

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        if mechanism.accesses <= cls.serves:
            return None
        return (
            f"strategy 'ship' sends queries to the blocks that they chose, and {type(mechanism).__name__} chooses no "
            "blocks; set parallel.strategy='ring' or 'fetch'."
        )

    def attend(
        self, planner: ShardedPlanner, attention_mask: AttentionMask, key_routing: KeyRouting
    ) -> DistributedAttention:
        shards, blocks, mine, heads = planner.shards, key_routing.blocks, planner.local_rows, planner.share.local_heads
        return _QueryDispatchAttention(
            tokens_local=shards.tokens_local,
            heads=heads,
            routing_width=key_routing.routing_width,
            attention_mask=attention_mask,
            shards=shards,
            channel=self.channel,
            key_routing=key_routing,
            holders=BlockOwners.of(attention_mask, blocks, shards),
            local=Plan.build(mine, mine, attention_mask, heads=heads.query),
            backend=planner.backend,
        )


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _QueryDispatchAttention(DistributedAttention):
    attention_mask: AttentionMask
    shards: Shards
    channel: Channel
    key_routing: KeyRouting
    holders: BlockOwners
    local: Plan
    backend: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        selection = self.key_routing.route(q, k).selection
        assert selection is not None
        leaving = self._leaving(selection, self.channel.rank)
        arriving, planned = self._announce(leaving)
        sent = self._send(q[self._places(leaving, q)], leaving.items, arriving, kind="q")
        local = self.local.with_selection(selection)
        out, lse = (x.to(accumulation_dtype(q.dtype)) for x in attention_forward(q, k, v, local, backend=self.backend))
        found = self._attend_arrivals(sent.wait(), k, v, planned)
        arrived = self._send(found, arriving, leaving.items, kind="out").wait()
        for row, head, part in self._by_rank(leaving, arrived):
            my_out, my_lse = out[row, head][:, None], lse[row, head][:, None]
            merge_(my_out, my_lse, part[:, None, :-1], part[:, -1:])
            out[row, head], lse[row, head] = my_out[:, 0], my_lse[:, 0]
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse), (leaving, arriving, planned, local))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, out, lse = saved.tensors
        leaving, arriving, planned, local = saved.extras
        row, head = self._places(leaving, q)
        rows = torch.cat((q[row, head], dout[row, head], out[row, head]), dim=1)
        rows_sent = self._send(rows, leaving.items, arriving, kind="dout")
        lse_sent = self._send(lse[row, head][:, None], leaving.items, arriving, kind="lse")
        gradients = attention_backward(dout, q, k, v, out, lse, local, backend=self.backend)
        dq, dk, dv = (x.to(accumulation_dtype(q.dtype)) for x in gradients)
        my_q, my_dout, my_out = (
            x[:, None].contiguous() for x in rows_sent.wait().split((q.shape[2], v.shape[2], v.shape[2]), dim=1)
        )
        found = attention_backward(
            my_dout, my_q, planned.keys(k), planned.keys(v), my_out, lse_sent.wait(), planned.plan, backend=self.backend
        )
        dk = dk + planned.back(found[1])
        dv = dv + planned.back(found[2])
        arrived = self._send(found[0][:, 0].to(dq.dtype), arriving, leaving.items, kind="dq").wait()
        for row, head, part in self._by_rank(leaving, arrived):
            dq[row, head] += part
        return dq, dk, dv

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[4]

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """Of each item: q and what it chose go, out and its log-sum-exp come back in the accumulation dtype.

        Backward: q, dout, out and the log-sum-exp go, dq comes back. Before the first, how many come.
        """
        leaving, arriving, entries = self._counts(routing())
        asked = leaving * (ITEM_BYTES + sizes.head_dim * sizes.element_bytes) + entries * ENTRY_BYTES
        asked += (self.channel.size - 1) * COUNT_BYTES
        given_again = (sizes.head_dim + 2 * sizes.value_dim) * sizes.element_bytes + sizes.accumulation_bytes
        there = Volume(forward=asked, backward=leaving * given_again)
        back = Volume(
            forward=arriving * (sizes.value_dim + 1) * sizes.accumulation_bytes,
            backward=arriving * sizes.head_dim * sizes.accumulation_bytes,
        )
        choice = all_reduce_move(self.key_routing.all_reduced(sizes), self.channel)
        return Move(there, self.channel, hidden=True), Move(back, self.channel, hidden=False), choice

    @property
    def queries(self) -> Queries:
        return Queries(self.shards.index[self.channel.rank], self.heads.query)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """Backward: items here and leaving, their gradients, and those of the local keys."""
        leaving, arriving, _ = self._counts(routing())
        item = (sizes.head_dim + 2 * sizes.value_dim) * sizes.element_bytes + sizes.head_dim * sizes.accumulation_bytes
        keys = self.tokens_local * self.heads.kv * sizes.kv_width * (sizes.element_bytes + 2 * sizes.accumulation_bytes)
        return (leaving + arriving) * item + keys

    def _counts(self, routing: Routing) -> tuple[int, int, int]:
        """Return the items that leave and arrive, and the entries that leave, by the routing of the full sequence."""
        assert isinstance(routing, SelectedBlocks), "which queries are sent depends on the blocks that they select"
        rank, one_in, selection = self.channel.rank, routing.one_in, routing.selection
        by_rank = [self._leaving(selection.of_queries(rows), reader) for reader, rows in enumerate(self.shards.index)]
        arriving = sum(shipments.items[rank] for shipments in by_rank)
        return sum(by_rank[rank].items) * one_in, arriving * one_in, sum(by_rank[rank].entries) * one_in

    def _leaving(self, selection: BlockSelection, rank: int) -> DispatchPlan:
        return DispatchPlan.of(selection, self.holders, self.shards, rank, self.heads.query)

    def _announce(self, leaving: DispatchPlan) -> tuple[tuple[int, ...], ReceivedQueries]:
        """Tell the others what comes; return how many items come here from each, and what they attend to."""
        counts = torch.tensor((leaving.items, leaving.entries)).t().contiguous()
        items, entries = self.channel.all_to_all(counts, kind="ship_choice").t().tolist()
        token = self.shards.index[self.channel.rank][leaving.row]
        described = torch.stack((token, leaving.head, leaving.count), dim=1).int()
        described = self._exchange(described, leaving.items, items)
        block = self._exchange(leaving.block.int(), leaving.entries, entries)
        token, head, count = described.long().t()
        planned = ReceivedQueries.of(
            self.attention_mask,
            self.key_routing.blocks,
            self.shards,
            self.channel.rank,
            heads=self.heads.query,
            kv_heads=self.heads.kv,
            token=token,
            head=head,
            count=count,
            block=block.long(),
        )
        return tuple(items), planned

    def _exchange(self, x: Tensor, sent: tuple[int, ...], received: list[int]) -> Tensor:
        return self.channel.all_to_all_uneven(x, sent=sent, received=received, kind="ship_choice")

    def _send(self, x: Tensor, sent: tuple[int, ...], received: tuple[int, ...], *, kind: str) -> Transfer:
        return self.channel.start_all_to_all(x, sent=sent, received=received, kind=f"ship_{kind}")

    def _attend_arrivals(self, q: Tensor, k: Tensor, v: Tensor, planned: ReceivedQueries) -> Tensor:
        """Return out and log-sum-exp of items, `[items, Dv + 1]` in the accumulation dtype."""
        out, lse = attention_forward(q[:, None], planned.keys(k), planned.keys(v), planned.plan, backend=self.backend)
        return torch.cat((out[:, 0].to(lse.dtype), lse), dim=1)

    @staticmethod
    def _places(leaving: DispatchPlan, like: Tensor) -> tuple[Tensor, Tensor]:
        return leaving.row.to(like.device), leaving.head.to(like.device)

    def _by_rank(self, leaving: DispatchPlan, arrived: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return rows, heads and results, rank by rank: of one rank, no row and head comes twice."""
        row, head = self._places(leaving, arrived)
        return list(zip(*(x.split(leaving.items) for x in (row, head, arrived)), strict=True))


STRATEGIES.add(Ship.name, Ship)
