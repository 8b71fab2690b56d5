"""What every kind of mechanism owes to the strategies: it asks its planner for what it claims, and for nothing else."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Access, Mechanism
from farspan.kernels.planner import Heads, KeyRouting, SequenceAttention, Sizes
from farspan.kernels.sequence_attention import SequencePlanner, plan_sequence_attention

EXAMPLES = [
    pytest.param(example, id=str(example)) for name in MECHANISMS for example in MECHANISMS.get(name).examples()
]
ROWS, HEADS = Rows.packed([60, 37], padding=3), Heads(query=8, kv=2)


def inputs(mechanism: Mechanism) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    widths = [(HEADS.query, 8), (HEADS.kv, 8), (HEADS.kv, 4)]
    if mechanism.routing_width:
        widths.append((HEADS.kv, mechanism.routing_width))
    return [torch.randn(len(ROWS), *width, generator=generator) for width in widths]


def access_of(key_routing: KeyRouting) -> Access:
    if key_routing.selects_blocks:
        return Access.BLOCKS
    return Access.MASK if type(key_routing) is KeyRouting else Access.LIFETIMES


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_a_kind_asks_for_what_it_claims(mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, scan, asked = SequencePlanner.attend, SequencePlanner.scan, set()

    def recorded_attend(
        planner: SequencePlanner, attention_mask: AttentionMask, key_routing: KeyRouting
    ) -> SequenceAttention:
        asked.add(access_of(key_routing))
        assert not key_routing.selects_blocks or key_routing.key_blocks.count > 0
        return attend(planner, attention_mask, key_routing)

    def recorded_scan(planner: SequencePlanner, decay: Tensor) -> SequenceAttention:
        asked.add(Access.STATE)
        return scan(planner, decay)

    monkeypatch.setattr(SequencePlanner, "attend", recorded_attend)
    monkeypatch.setattr(SequencePlanner, "scan", recorded_scan)
    # Some kinds plan in the forward pass, when their routing is known.
    plan_sequence_attention(mechanism, ROWS, HEADS, range(8), backend="cpu").forward(*inputs(mechanism))
    assert asked == mechanism.accesses
    assert mechanism.static_mask is None or asked == {Access.MASK}


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_what_a_kind_saves_is_what_it_says(mechanism: Mechanism) -> None:
    """The estimate of memory: a kind made of others may count inputs that these share more than once, but no less."""
    if Access.STATE in mechanism.accesses or Access.LIFETIMES in mechanism.accesses:
        pytest.skip("the estimate counts an out and a log-sum-exp, or leaves out the routing")
    rows = Rows.packed([1000])
    generator = torch.Generator().manual_seed(0)
    sizes = [(HEADS.query, 64), (HEADS.kv, 64), (HEADS.kv, 64)]
    if mechanism.routing_width:
        sizes.append((HEADS.kv, mechanism.routing_width))
    tensors = [torch.randn(1000, *size, generator=generator) for size in sizes]
    if mechanism.unsupported_reason(HEADS, 1000) is not None:
        pytest.skip("its options are for shorter documents")
    out, saved = plan_sequence_attention(mechanism, rows, HEADS, range(8), backend="cpu").forward(*tensors)
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (out, *saved.tensors)}
    stated = mechanism.saved_bytes(HEADS, Sizes.of(torch.float32, 64, 64), rows) * len(rows)
    assert 0.6 * stated <= sum(kept.values()) <= 1.1 * stated
