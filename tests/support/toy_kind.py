"""A kind of mechanism that is nowhere but here: what a newcomer would add as one file of `kernels/kinds/`, a mechanism
of it, and its truth for the tests.

`out = sum over branches of sigmoid(gate) x attention of the branch`, with gates that the router gives. Importing this
module registers it, and a process that is handed an instance imports it. `pytest -p tests.support.toy_kind`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, final

import torch
from torch import Tensor

from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Access, Mechanism
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.merge import accumulation_dtype
from farspan.kernels.planner import (
    AttentionPlanner,
    Composition,
    Heads,
    HeadShare,
    Routing,
    RoutingSource,
    Saved,
    SequenceAttention,
    Sizes,
)
from tests.support import truth


class GatedSum(Mechanism):
    """Routing has a gate for each branch, then the routing of the branches, one after another."""

    @abstractmethod
    def branches(self) -> tuple[Mechanism, ...]:
        """Return the mechanisms whose outputs are added."""

    @property
    def routing_width(self) -> int:
        return len(self.branches()) + sum(branch.routing_width for branch in self.branches())

    @property
    def heads_differ(self) -> bool:
        return any(branch.heads_differ for branch in self.branches())

    @property
    def accesses(self) -> frozenset[Access]:
        return frozenset().union(*(branch.accesses for branch in self.branches()))

    def split(self, routing: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """Return the gates `[T, Hk, branches]` and the routing that each branch takes, if any."""
        gates, *of_branches = routing.split([len(self.branches()), *(x.routing_width for x in self.branches())], dim=-1)
        return gates, [[x] if x.shape[-1] else [] for x in of_branches]

    def plan(self, planner: AttentionPlanner) -> SequenceAttention:
        return _GatedSumAttention(self, planner, tuple(branch.plan(planner) for branch in self.branches()))

    def unmasked_pairs(self, rows: Rows) -> int:
        return sum(branch.unmasked_pairs(rows) for branch in self.branches())

    def keys_per_query(self, global_rows: Rows) -> Tensor:
        return torch.stack([branch.keys_per_query(global_rows) for branch in self.branches()]).sum(dim=0)

    def saved_bytes(self, heads: Heads, sizes: Sizes, global_rows: Rows) -> int:
        # The output of a branch is saved once more, for the gradient of its gate.
        out = heads.query * sizes.value_dim * sizes.element_bytes
        return sum(branch.saved_bytes(heads, sizes, global_rows) + out for branch in self.branches())

    def kept_bytes(self, heads: Heads, global_rows: Rows, *, tokens: int, packed: bool) -> int:
        return sum(x.kept_bytes(heads, global_rows, tokens=tokens, packed=packed) for x in self.branches())

    def route(self, global_rows: Rows, heads: Heads, q: Tensor, k: Tensor, *routing: Tensor) -> "BranchRouting":
        zipped = zip(self.branches(), self.split(routing[0])[1], strict=True)
        return BranchRouting(tuple(branch.route(global_rows, heads, q, k, *own) for branch, own in zipped))

    def sample_routing(self, global_rows: Rows, heads: Heads, *, max_queries: int | None = None) -> "BranchRouting":
        return BranchRouting(
            tuple(branch.sample_routing(global_rows, heads, max_queries=max_queries) for branch in self.branches())
        )

    def unsupported_reason(self, heads: Heads, longest: int) -> str | None:
        reasons = (branch.unsupported_reason(heads, longest) for branch in self.branches())
        return next((reason for reason in reasons if reason is not None), None)


@dataclass(frozen=True, slots=True, eq=False)
class BranchRouting(Routing):
    branches: tuple[Routing, ...]

    def of_heads(self, share: HeadShare) -> "BranchRouting":
        return BranchRouting(tuple(branch.of_heads(share) for branch in self.branches))

    def tensors(self) -> list[Tensor]:
        return [tensor for branch in self.branches for tensor in branch.tensors()]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _GatedSumAttention(SequenceAttention):
    mechanism: GatedSum
    planner: AttentionPlanner
    branches: tuple[SequenceAttention, ...]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Saved]:
        q, k, v, routing = inputs
        gates, of_branches = self.mechanism.split(routing)
        total = torch.zeros(*q.shape[:2], v.shape[2], dtype=accumulation_dtype(q.dtype), device=q.device)
        outs, tensors, extras = [], [], []
        for number, (branch, own) in enumerate(zip(self.branches, of_branches, strict=True)):
            out, saved = branch.forward(q, k, v, *own)
            total += out.to(total.dtype) * self._weight(gates, number, q.shape[1])
            outs.append(out)
            tensors.append(saved.tensors)
            extras.append(saved.extras)
        flat = (tensor for of_branch in tensors for tensor in of_branch)
        return total.to(q.dtype), Saved((gates, *outs, *flat), (k.shape[1], [len(x) for x in tensors], extras))

    def backward(self, dout: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        gates, *rest = saved.tensors
        kv_heads, counts, extras = saved.extras
        outs, rest = rest[: len(self.branches)], rest[len(self.branches) :]
        summed: list[Tensor] = []
        dgates, routing_gradients = torch.zeros_like(gates), []
        for number, (branch, out) in enumerate(zip(self.branches, outs, strict=True)):
            weight = self._weight(gates, number, out.shape[1])
            wide = dout.to(weight.dtype)
            # The query heads of a KV head share a gate: [T, Hq, Dv] -> [T, Hk, G x Dv] -> [T, Hk]
            dweight = (wide * out.to(weight.dtype)).unflatten(1, (kv_heads, -1)).flatten(2).sum(dim=2)
            sigmoid = gates[..., number].sigmoid()
            dgates[..., number] = dweight * sigmoid * (1 - sigmoid)
            tensors, rest = rest[: counts[number]], rest[counts[number] :]
            of_branch = Saved(tuple(tensors), extras[number])
            found = [x.to(weight.dtype) for x in branch.backward((wide * weight).to(dout.dtype), of_branch)]
            summed = [a + b for a, b in zip(summed, found[:3], strict=True)] if summed else found[:3]
            routing_gradients += found[3:]
        return *summed, torch.cat((dgates, *routing_gradients), dim=-1)

    def composition(self, sizes: Sizes, routing: RoutingSource) -> Composition:
        heads = self.planner.share.local_heads
        total = len(self.planner.tokens) * heads.query * sizes.value_dim * sizes.accumulation_bytes
        sources = (partial(_of_branch, routing, number) for number in range(len(self.branches)))
        return Composition(branches=tuple(zip(self.branches, sources, strict=True)), working_bytes=total)

    @staticmethod
    def _weight(gates: Tensor, number: int, heads: int) -> Tensor:
        """Return the weight of a branch's output, `[T, Hq, 1]`."""
        weight = gates[..., number].sigmoid()
        return weight.repeat_interleave(heads // weight.shape[1], dim=1).unsqueeze(-1)


def _of_branch(routing: RoutingSource, number: int) -> Routing:
    found = routing()
    return found.branches[number] if isinstance(found, BranchRouting) else found


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class WindowAndBlocks(GatedSum):
    """window: of one branch. The other is MoBA with blocks of `block` keys or, with a sparsity, MoSA."""

    window: int = 5
    block: int = 16
    sparsity: int = 0

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return cls(window=5, block=16), cls(window=9, sparsity=4)

    @classmethod
    def benchmarks(cls) -> Mapping[str, Self]:
        return {"gated_5x16": cls(window=5, block=16)}

    def branches(self) -> tuple[Mechanism, ...]:
        other = MoSA(sparsity=self.sparsity) if self.sparsity else MoBA(block=self.block, top_k=2)
        return Window(window=self.window), other


MECHANISMS.add("gated", WindowAndBlocks)


@truth.visible.register
def _(mechanism: GatedSum, inputs: Sequence[Tensor], rows: Rows) -> Tensor:
    of_branches = zip(mechanism.branches(), mechanism.split(inputs[3])[1], strict=True)
    masks = [truth.visible(branch, [*inputs[:3], *own], rows) for branch, own in of_branches]
    return torch.stack(masks).any(dim=0)


@truth.attend.register
def _(mechanism: GatedSum, inputs: Sequence[Tensor], rows: Rows) -> truth.Truth:
    q, k, v, routing = inputs
    gates, of_branches = mechanism.split(routing)
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for number, (branch, own) in enumerate(zip(mechanism.branches(), of_branches, strict=True)):
        weight = 1 / (1 + torch.exp(-gates[..., number]))
        of_head = weight[:, [head * k.shape[1] // q.shape[1] for head in range(q.shape[1])]]
        out = out + truth.attend(branch, [q, k, v, *own], rows).out * of_head.unsqueeze(-1)
    return truth.Truth(out)
