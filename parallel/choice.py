"""Choice: what a mechanism chooses, once, from what all ranks hold; strategies that deal tokens ask for it.

The choice is part of the plans of local queries against keys, whichever rank the keys come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from farspan.kernels.ageing import AgeingHolding, TypeLearning
from farspan.kernels.lifetimes import Lifetimes
from farspan.kernels.mechanism import Ageing, Heads, Holding, Masked, Routed
from farspan.kernels.plan import Plan
from farspan.parallel.comm import Channel
from farspan.parallel.layout import Shards


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Nothing is chosen where both are None.

    holding: of a routed mechanism. ageing: of one whose keys have lifetimes.
    """

    holding: Holding | None = None
    ageing: AgeingHolding | None = None

    @staticmethod
    def of(mechanism: Masked, shards: Shards, heads: Heads, channel: Channel, *, strategy: str) -> "Choice":
        """Return the choice of a mechanism for one dealt sequence; bytes are counted under the strategy's name."""
        rank = channel.rank
        if isinstance(mechanism, Routed):
            holding = Holding(
                mechanism=mechanism,
                rows=shards.rows_of(rank),
                everyone=shards.rows,
                heads=range(heads.query),
                all_heads=heads,
                total=partial(channel.all_reduce, kind=f"{strategy}_choice"),
            )
            return Choice(holding=holding)
        if isinstance(mechanism, Ageing):
            ageing = AgeingHolding(
                mechanism=mechanism,
                everyone=shards.rows,
                rows=shards.index[rank],
                share=1.0,
                total=partial(channel.all_reduce, kind=f"{strategy}_types"),
            )
            return Choice(ageing=ageing)
        return Choice()

    def choose(
        self, plans: Sequence[Plan], tokens: Sequence[Tensor], q: Tensor, k: Tensor, *routing: Tensor
    ) -> tuple[tuple[Plan, ...], Lifetimes | None]:
        """Return the plans with what was chosen, and the lifetimes if keys have them.

        tokens: of the keys of each plan, int64 `[keys]`, the tokens of the sequence. q, k and routing are the local
        ones. Every rank has to call.
        """
        if self.ageing is not None:
            lifetimes = self.ageing.lifetimes(*routing)
            last = (lifetimes.take(of_keys).last for of_keys in tokens)
            return tuple(plan.living(x) for plan, x in zip(plans, last, strict=True)), lifetimes
        if self.holding is not None:
            selection = self.holding.mechanism.select(q, k, self.holding)
            return tuple(plan.choosing(selection) for plan in plans), None
        return tuple(plans), None

    def learning(self, lifetimes: Lifetimes | None, saved: Sequence[Tensor]) -> TypeLearning | None:
        """Return what collects the gradient of lifetimes in a backward pass; saved: see `learns_from`."""
        if self.ageing is None or lifetimes is None:
            return None
        causal_lse, routing = saved
        return TypeLearning(self.ageing, lifetimes, causal_lse, routing)


def volume_of_choice(degree: int, total_bytes: int) -> int:
    """Return the bytes that a rank sends of what is summed over all ranks: 2 (P-1)/P of it."""
    return 2 * (degree - 1) * total_bytes // degree
