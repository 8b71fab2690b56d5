"""Batches of active keys: every visible pair once, and not many others."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.lifetimes.lifetimes import DocumentOrder, Lifetimes
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.planning import lifetime_batches as module
from farspan.kernels.planning.lifetime_batches import lifetime_batches
from farspan.kernels.planning.plan import Plan
from farspan.kernels.planning.regions import Kind
from tests.support.attention_cases import Tensors, run
from tests.support.batches import covered
from tests.support.oracle import assert_close

KV_HEADS, GROUP = 2, 3
ROWS = Rows.packed([70, 1, 2, 50, 3, 90], padding=5)
SHUFFLED = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(2))


def random_lifetime(rows: Rows) -> Tensor:
    """Lifetimes of two KV heads, one with many global tokens and one with few."""
    generator = torch.Generator().manual_seed(0)
    types = torch.randint(0, 3, (len(rows), KV_HEADS), generator=generator)
    types[torch.rand(len(rows), generator=generator) < 0.9, 1] = 2
    return Lifetimes.of(types.to(torch.int8), DocumentOrder.of(rows), window=6).last


def plan_of(queries: Tensor, keys: Tensor, rows: Rows = ROWS) -> Plan:
    plan = Plan.build(rows.take(queries), rows.take(keys), AttentionMask(), heads=KV_HEADS * GROUP)
    return plan.with_lifetimes(random_lifetime(rows)[:, keys])


PARTS = {
    "all": (torch.arange(len(ROWS)), torch.arange(len(ROWS))),
    "striped": (torch.arange(0, len(ROWS), 2), torch.arange(1, len(ROWS), 2)),
    "earlier keys": (torch.arange(60, len(ROWS)), torch.arange(0, 130)),
    "shuffled": (SHUFFLED[:150], SHUFFLED[40:]),
    "padding": (torch.arange(len(ROWS) - 5, len(ROWS)), torch.arange(len(ROWS))),
}


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"TILE": 16, "KEY_MULTIPLE": 4, "ENTRIES_AT_ONCE": 100, "BATCH_PAIRS": 4000, "BATCH_ROWS": 40}
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("part", list(PARTS))
@pytest.mark.parametrize("small", [True, False])
def test_every_visible_pair_is_in_one_batch(part: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        small_tiles(monkeypatch)
    plan = plan_of(*PARTS[part])
    batches = list(lifetime_batches(plan, KV_HEADS))
    assert torch.equal(covered(batches, plan, KV_HEADS), plan.mask().int())
    if small and part in ("all", "striped", "earlier keys"):
        assert {batch.kind for batch in batches} == {Kind.FULL, Kind.MASKED}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", list(PARTS))
def test_many_small_tiles_equal_one_mask(part: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    plan = plan_of(*PARTS[part])
    tensors = Tensors.random(len(plan.queries), len(plan.keys), (KV_HEADS * GROUP, KV_HEADS), (16, 8), dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert_close(run(tensors, plan, "cpu"), run(tensors, plan, "reference"), tolerance)


def test_work_follows_the_visible_pairs() -> None:
    rows = Rows.packed([6000])
    types = torch.where(torch.rand(6000, 2, generator=torch.Generator().manual_seed(0)) < 0.05, 0, 2).to(torch.int8)
    lifetimes = Lifetimes.of(types, DocumentOrder.of(rows), window=16)
    plan = Plan.build(rows, rows, AttentionMask(), heads=4).with_lifetimes(lifetimes.last)
    visited = sum(batch.queries.numel() * batch.keys.shape[1] for batch in lifetime_batches(plan, 2)) // 4
    assert visited < 2.5 * lifetimes.pairs(rows) < 0.2 * 6000 * 6001 / 2
