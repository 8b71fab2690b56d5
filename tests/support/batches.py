"""The pairs that batches of gathered rows claim to compute."""

from collections.abc import Iterable

import torch
from torch import Tensor

from farspan.kernels.planning.gathered_batches import Batch
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind


def covered(batches: Iterable[Batch], plan: Plan, kv_heads: int) -> Tensor:
    """How many batches claim each pair, int32 `[heads, queries, keys]`; a batch may name a query row only once."""
    count = torch.zeros(plan.heads, len(plan.queries), len(plan.keys), dtype=torch.int32)
    for batch in batches:
        claimed = batch.queries.numel() - batch.filler
        assert batch.queries.flatten()[:claimed].unique().numel() == batch.queries.unique().numel() == claimed
        for number, (queries, keys) in enumerate(zip(batch.queries, batch.keys, strict=True)):
            pairs = torch.ones(len(queries), len(keys), dtype=torch.int32)
            if batch.kind is not Kind.FULL:
                pairs = pairs.tril() if batch.mask is None else batch.mask[number].int()
            if number == len(batch.queries) - 1:
                queries, pairs = queries[: len(queries) - batch.filler], pairs[: len(queries) - batch.filler]
            head = queries % plan.heads
            # Padded keys of a masked problem repeat a key, so pairs add up.
            index = head[:, None], queries[:, None] // plan.heads, keys[None] // kv_heads
            count.index_put_(index, pairs, accumulate=True)
            assert (head // (plan.heads // kv_heads))[:, None].eq((keys % kv_heads)[None]).logical_or(pairs == 0).all()
    return count
