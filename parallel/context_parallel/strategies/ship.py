"""Ship: queries travel to the ranks that hold the keys they chose, and partial results come back.

For routed mechanisms, whose queries choose few blocks: at many ranks this sends less than passing all keys around, when
P - 1 > (Hq / Hk) x (ranks that a query needs) x (bytes of a query and its result / bytes of a key and its value).
Queries are sent one head at a time, to each rank that holds visible rows of a chosen block (see query_dispatch.py),
while local attention runs. Results are merged in float32, in the order of the ranks. Backward, queries are sent again
with the gradient of out, out and the log-sum-exp; gradients of keys stay with their owner, so `grad_comm_dtype` has no
effect. The host waits for how many queries each pair of ranks exchanges, once for each choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from farspan.kernels.attention import attention_backward, attention_forward, prepare_attention
from farspan.kernels.backend import BACKENDS
from farspan.kernels.caching import once
from farspan.kernels.device_copies import DeviceCopies
from farspan.kernels.kinds.routed import SelectedBlocks
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.packed_selection import PackedSelection
from farspan.kernels.masks.selection import BlockSelection
from farspan.kernels.mechanism import Access
from farspan.kernels.merge import accumulation_dtype, merge_
from farspan.kernels.planner import InputSpec, KeyRouting, Routing, RoutingSource, Saved, Sizes, no_routing
from farspan.kernels.planning.plan import Plan
from farspan.parallel.comm import Transfer
from farspan.parallel.context_parallel.query_dispatch import BlockOwners, DispatchPlan, LocalKeys
from farspan.parallel.context_parallel.strategy import (
    STRATEGIES,
    DistributedAttention,
    Move,
    ShardedPlanner,
    Strategy,
    all_reduce_move,
)

# int32 numbers sent ahead of attention. For each query: token, head and number of blocks; for each chosen block: its
# number; int64 to each rank: how many queries and blocks follow.
QUERY_BYTES, BLOCK_BYTES, COUNT_BYTES = 12, 4, 16


@final
class Ship(Strategy):
    """For routed mechanisms only; works under every layout and any numbers of heads."""

    name, serves, fallback_strategy = "ship", frozenset({Access.BLOCKS}), "state"

    not_served = (
        "sends queries to the blocks that they chose, and {mechanism} chooses no blocks; set parallel.strategy='ring' "
        "or 'fetch'."
    )

    def attend(
        self, planner: ShardedPlanner, attention_mask: AttentionMask, key_routing: KeyRouting
    ) -> DistributedAttention:
        return _QueryDispatchAttention(
            planner=planner,
            routing_width=key_routing.routing_width,
            key_routing=key_routing,
            owners=BlockOwners.of(
                attention_mask, key_routing.key_blocks, planner.shards, planner.share.local_heads.query
            ),
            local_keys=LocalKeys.of(planner, attention_mask, key_routing.key_blocks),
            token=DeviceCopies(planner.tokens),
            local=planner.plan_of(attention_mask, planner.tokens, planner.tokens),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Exchange:
    """What follows from a choice: the queries dispatched and received, as a plan and their number from each rank."""

    dispatch: DispatchPlan
    received: Plan
    counts: Sequence[int]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class _QueryDispatchAttention(DistributedAttention):
    """exchanges: by selection, which is that of the first pass where activations are recomputed, and of all layers
    where a pattern does not depend on content.
    """

    key_routing: KeyRouting
    owners: BlockOwners
    local_keys: LocalKeys
    token: DeviceCopies
    local: Plan
    exchanges: WeakKeyDictionary[BlockSelection | PackedSelection, _Exchange] = field(
        default_factory=WeakKeyDictionary, init=False
    )

    def prepare(self, spec: InputSpec) -> None:
        routed = self.key_routing.prepare(spec)
        prepare_attention(self.local, self.planner.tokens, routed, spec, backend=self.backend)
        if routed is not None and routed.selection is not None:
            BACKENDS.get(self.backend).prepare_choices(self.local.with_selection(routed.selection), spec.device)
        self.local_keys.prepare(spec, backend=self.backend)
        for table in (self.token, self.owners.owner, self.owners.first_position, self.owners.position):
            table.on(spec.device)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v = inputs
        selection = self.key_routing.route(q, k).selection
        assert selection is not None
        local = self.local.with_selection(selection)
        exchange = once(self.exchanges, selection, lambda: self._announce(local))
        sent, row, head = exchange.dispatch.queries_per_rank, exchange.dispatch.row, exchange.dispatch.head
        # Dispatched queries are rows of one head: [T, Hq, D] -> [queries, D]
        transfer = self._send(q[row, head], sent, exchange.counts, kind="q")
        out, lse = (x.to(accumulation_dtype(q.dtype)) for x in attention_forward(q, k, v, local, backend=self.backend))
        partial = self._attend_received(transfer.wait(), k, v, exchange.received)
        arrived = self._send(partial, exchange.counts, sent, kind="out").wait()
        for rows, heads, part in _rank_by_rank(sent, row, head, arrived):
            row_out, row_lse = out[rows, heads][:, None], lse[rows, heads][:, None]  # [queries, 1, Dv], [queries, 1]
            merge_(row_out, row_lse, part[:, None, :-1], part[:, -1:])
            out[rows, heads], lse[rows, heads] = row_out[:, 0], row_lse[:, 0]
        out = out.to(q.dtype)
        return out, Saved((q, k, v, out, lse, row, head), (exchange, local))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        q, k, v, out, lse, row, head = saved.tensors
        exchange, local = saved.extras
        sent, counts = exchange.dispatch.queries_per_rank, exchange.counts
        packed = torch.cat((q[row, head], dout[row, head], out[row, head]), dim=1)  # [queries, D + 2 Dv]
        rows_transfer = self._send(packed, sent, counts, kind="dout")
        lse_transfer = self._send(lse[row, head][:, None], sent, counts, kind="lse")  # [queries, 1]
        gradients = attention_backward(dout, q, k, v, out, lse, local, backend=self.backend)
        dq, dk, dv = (x.to(accumulation_dtype(q.dtype)) for x in gradients)
        widths = q.shape[2], v.shape[2], v.shape[2]
        # [queries, D + 2 Dv] -> [queries, 1, D], [queries, 1, Dv], [queries, 1, Dv]
        their_q, their_dout, their_out = (x[:, None].contiguous() for x in rows_transfer.wait().split(widths, dim=1))
        their_k, their_v = self.local_keys.as_one_head(k), self.local_keys.as_one_head(v)
        their_lse = lse_transfer.wait()
        their_dq, part_dk, part_dv = attention_backward(
            their_dout, their_q, their_k, their_v, their_out, their_lse, exchange.received, backend=self.backend
        )
        dk = dk + self.local_keys.as_kv_heads(part_dk)
        dv = dv + self.local_keys.as_kv_heads(part_dv)
        arrived = self._send(their_dq[:, 0].to(dq.dtype), counts, sent, kind="dq").wait()  # [queries, D]
        for rows, heads, part in _rank_by_rank(sent, row, head, arrived):
            dq[rows, heads] += part
        return dq, dk, dv

    def lse(self, saved: Saved) -> Tensor:
        return saved.tensors[4]

    def _announce(self, local: Plan) -> _Exchange:
        """Exchange what is dispatched by the choice of the local queries; the only time that the host waits for it."""
        choices = self.owners.choices(self.channel.rank, *BACKENDS.get(self.backend).choices(local, self.heads.kv))
        their_sizes = self.channel.all_to_all(choices.per_rank, kind="ship_choice")
        sizes, their_sizes = torch.stack((choices.per_rank, their_sizes)).cpu().tolist()  # [2, P, 2]
        dispatch, (queries, blocks) = choices.plan(sizes), zip(*their_sizes, strict=True)
        token = self.token.on(dispatch.row.device)[dispatch.row]
        described = torch.stack((token, dispatch.head, dispatch.num_blocks), dim=1).int()  # [queries, 3]
        described = self._send(described, dispatch.queries_per_rank, queries, kind="choice").wait()
        block = self._send(dispatch.block.int(), dispatch.blocks_per_rank, blocks, kind="choice").wait()
        received = self.local_keys.received(described.long(), block.long())
        return _Exchange(dispatch=dispatch, received=received, counts=queries)

    def _send(self, x: Tensor, sent: Sequence[int], received: Sequence[int], *, kind: str) -> Transfer:
        return self.channel.start_all_to_all(x, sent=sent, received=received, kind=f"ship_{kind}")

    def _attend_received(self, q: Tensor, k: Tensor, v: Tensor, received: Plan) -> Tensor:
        """Return out and log-sum-exp of received queries, `[queries, Dv + 1]` in the accumulation dtype."""
        keys, values = self.local_keys.as_one_head(k), self.local_keys.as_one_head(v)
        out, lse = attention_forward(q[:, None], keys, values, received, backend=self.backend)
        return torch.cat((out[:, 0].to(lse.dtype), lse), dim=1)

    # What it costs.

    def moves(self, sizes: Sizes, routing: RoutingSource = no_routing) -> tuple[Move, ...]:
        """Forward: the numbers of queries and blocks, q and its chosen blocks go, accumulated out and lse come back.

        Backward: q, dout, out and lse go, accumulated dq comes back.
        """
        sent, received, blocks = self._counts(routing())
        asked = sent * (QUERY_BYTES + sizes.head_dim * sizes.element_bytes) + blocks * BLOCK_BYTES
        asked += (self.channel.size - 1) * COUNT_BYTES
        asked_again = (sizes.head_dim + 2 * sizes.value_dim) * sizes.element_bytes + sizes.accumulation_bytes
        # Queries travel during local attention; nothing is left to compute while the last results return.
        queries = Move(forward=asked, backward=sent * asked_again, channel=self.channel, overlapped=True)
        results = Move(
            forward=received * (sizes.value_dim + 1) * sizes.accumulation_bytes,
            backward=received * sizes.head_dim * sizes.accumulation_bytes,
            channel=self.channel,
        )
        return queries, results, all_reduce_move(self.key_routing.all_reduced(sizes), self.channel)

    def working_bytes(self, sizes: Sizes, routing: RoutingSource = no_routing) -> int:
        """Backward: queries sent and received, their gradients, and those of the local keys."""
        sent, received, _ = self._counts(routing())
        query = (sizes.head_dim + 2 * sizes.value_dim) * sizes.element_bytes + sizes.head_dim * sizes.accumulation_bytes
        keys = self.tokens_local * self.heads.kv * sizes.kv_width * (sizes.element_bytes + 2 * sizes.accumulation_bytes)
        return (sent + received) * query + keys

    def _counts(self, routing: Routing) -> tuple[int, int, int]:
        """Return the queries sent and received, and the selected blocks sent, by the routing of the full sequence."""
        assert isinstance(routing, SelectedBlocks), "the traffic of ship depends on the selection"
        rank, heads = self.channel.rank, self.heads.query
        # [sender, receiver, (queries, blocks)]
        counts = torch.stack(
            [
                self.owners.choices(sender, *routing.selection.of_queries(tokens).choices(heads)).per_rank
                for sender, tokens in enumerate(self.planner.shards.index)
            ]
        )
        sent, blocks = (counts[rank].sum(dim=0) * routing.one_in).tolist()
        return sent, int(counts[:, rank, 0].sum()) * routing.one_in, blocks


def _rank_by_rank(sent: Sequence[int], *of_queries: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the parts of each rank that has any: it returns a row and head at most once, so there are no duplicates."""
    parts = zip(*(x.split(sent) for x in of_queries), strict=True)
    return (part for part, queries in zip(parts, sent, strict=True) if queries)


STRATEGIES.add(Ship.name, Ship)
