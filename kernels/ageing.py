"""What one holder of rows does for attention whose keys have lifetimes: agree on them, and learn from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.lifetimes import Lifetimes, Line, chosen_types
from farspan.kernels.mechanism import Ageing, Heads, Total
from farspan.kernels.rows import Rows
from farspan.kernels.type_gradient import SUMS, straight_through, type_gradient


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AgeingHolding:
    """rows: token of the whole sequence `everyone` behind each row that is held here, int64 `[rows]`; -1 is padding.

    share: of the query heads of a KV head, how many are held here. total: sums over the holders of the other rows.
    """

    mechanism: Ageing
    everyone: Rows
    rows: Tensor
    share: float
    total: Total

    @staticmethod
    def share_of(heads: Heads, which: range) -> float:
        """Return how many of the query heads of a KV head are among `which`."""
        group = heads.query // heads.kv
        return min(len(which), group) / group

    def lifetimes(self, routing: Tensor) -> Lifetimes:
        """Return the lifetimes of the whole sequence by the routing `[rows, Hk, 3]` of the rows held here."""
        types = torch.zeros(len(self.everyone), routing.shape[1], dtype=torch.int8, device=routing.device)
        add_rows_(types, self.rows, chosen_types(routing))
        return self.mechanism.lifetimes(self.total(types), self.everyone)

    def no_sums(self, routing: Tensor) -> Tensor:
        """Return zeros to add the sums of `pair_sums` to, `[tokens, Hk, SUMS]`."""
        return routing.new_zeros(len(self.everyone), routing.shape[1], SUMS)

    def routing_gradient(self, sums: Tensor, routing: Tensor, lifetimes: Lifetimes) -> Tensor:
        """Return the gradient of routing `[rows, Hk, 3]`, by what this holder has found of the sums."""
        gradient = type_gradient(self.total(sums), lifetimes, self.everyone)
        # A KV head whose query heads are spread has this gradient summed over their holders.
        gradient += self.share * self.mechanism.penalties(lifetimes, self.everyone).to(gradient.device)
        line = Line.of(self.everyone)
        gradient.masked_fill_(line.back(line.forced)[:, None, None].to(gradient.device), 0.0)
        rows = self.rows.to(gradient.device)
        mine = gradient[rows.clamp(min=0)].masked_fill_((rows < 0)[:, None, None], 0.0) if len(gradient) else gradient
        return straight_through(mine, routing, self.mechanism.temperature)


def add_rows_(total: Tensor, rows: Tensor, part: Tensor) -> None:
    """Add part `[n, ...]` to the rows of `total` that int64 `rows` `[n]` names; -1 is none."""
    rows = rows.to(total.device)
    total.index_add_(0, rows[rows >= 0], part[rows >= 0])
