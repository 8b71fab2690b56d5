"""What one holder of rows does for attention whose keys have lifetimes: agree on them, and learn from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.lifetimes.gradient import SUMS, pair_sums, straight_through, type_gradient
from farspan.kernels.lifetimes.lifetimes import Lifetimes, Line, chosen_types
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import AllReduceSum, Heads, KVLifetime
from farspan.kernels.planning.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LifetimeShard:
    """rows: token of the whole sequence `global_rows` behind each row that is held here, int64 `[rows]`; -1 is padding.

    share: of the query heads of a KV head, how many are held here. total: sums over the holders of the other rows.
    """

    mechanism: KVLifetime
    global_rows: Rows
    rows: Tensor
    share: float
    total: AllReduceSum

    @staticmethod
    def share_of(heads: Heads, which: range) -> float:
        """Return how many of the query heads of a KV head are among `which`."""
        group = heads.query // heads.kv
        return min(len(which), group) / group

    def lifetimes(self, routing: Tensor) -> Lifetimes:
        """Return the lifetimes of the whole sequence by the routing `[rows, Hk, 3]` of the rows held here."""
        types = torch.zeros(len(self.global_rows), routing.shape[1], dtype=torch.int8, device=routing.device)
        _add_rows(types, self.rows, chosen_types(routing))
        return self.mechanism.lifetimes(self.total(types), self.global_rows)

    def routing_gradient(self, sums: Tensor, routing: Tensor, lifetimes: Lifetimes) -> Tensor:
        """Return the gradient of routing `[rows, Hk, 3]` by this holder's part of the sums, `[tokens, Hk, SUMS]`."""
        gradient = type_gradient(self.total(sums), lifetimes, self.global_rows)
        # A KV head whose query heads are spread has this gradient summed over their holders.
        gradient += self.share * self.mechanism.penalties(lifetimes, self.global_rows).to(gradient.device)
        line, rows = Line.of(self.global_rows), self.rows.to(gradient.device)
        gradient.masked_fill_(line.back(line.forced)[:, None, None].to(gradient.device), 0.0)
        mine = gradient.new_zeros(routing.shape)
        mine[rows >= 0] = gradient[rows[rows >= 0]]
        return straight_through(mine, routing, self.mechanism.temperature)


class TypeLearning:
    """Collects what a backward pass finds out about types, part by part of the keys.

    causal_lse: of all causal keys, `[T, Hq]`. routing: `[T, Hk, 3]` of the rows held here, which are the queries.
    """

    def __init__(self, local_shard: LifetimeShard, lifetimes: Lifetimes, causal_lse: Tensor, routing: Tensor) -> None:
        self.local_shard, self.lifetimes, self.causal_lse, self.routing = local_shard, lifetimes, causal_lse, routing
        self.sums = routing.new_zeros(len(local_shard.global_rows), routing.shape[1], SUMS)

    def add(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, plan: Plan, keys: Tensor) -> None:
        """Add the causal pairs, as `plan` has them, of the held queries and the tokens `keys`, int64 `[S]`."""
        of_keys = self.lifetimes.take(keys)
        sums = pair_sums(dout, q, k, v, out, self.causal_lse, plan=plan, lifetimes=of_keys)
        for rows, part in zip((self.local_shard.rows, keys), sums, strict=True):
            _add_rows(self.sums, rows, part)

    def gradient(self) -> Tensor:
        """Return the gradient of routing, `[T, Hk, 3]`; every holder has to ask."""
        return self.local_shard.routing_gradient(self.sums, self.routing, self.lifetimes)


def _add_rows(total: Tensor, rows: Tensor, part: Tensor) -> None:
    """Add part `[n, ...]` to the rows of `total` that int64 `rows` `[n]` names; -1 is none."""
    rows = rows.to(total.device)
    total.index_add_(0, rows[rows >= 0], part[rows >= 0])
