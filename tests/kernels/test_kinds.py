"""What every kind of mechanism owes to the strategies: it asks its planner for what it claims, and for nothing else."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.kinds.kv_lifetime import KVLifetime
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.lifetimes.lifetimes import Lifetimes
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Access, Mechanism
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.planner import Heads, KeyRouting, Saved, SequenceAttention, Sizes
from farspan.kernels.recomputation import choices_of_two_passes, kept
from farspan.kernels.sequence_attention import SequencePlanner, plan_sequence_attention
from farspan.trainer.toml_config import from_tree
from tests.support.mechanisms import examples, inputs_of

EXAMPLES = examples()
ROWS, HEADS = Rows.packed([60, 37], padding=3), Heads(query=8, kv=2)


def access_of(key_routing: KeyRouting) -> Access:
    if key_routing.selects_blocks:
        return Access.BLOCKS
    return Access.MASK if type(key_routing) is KeyRouting else Access.LIFETIMES


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
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
    attend_to(mechanism, ROWS)
    assert asked == mechanism.accesses
    assert mechanism.static_mask is None or asked == {Access.MASK}


@pytest.mark.parametrize("mechanism", [one for one in EXAMPLES if isinstance(one, Masked)], ids=str)
def test_causal_masks_show_no_later_token(mechanism: Masked) -> None:
    rows = Rows.packed([160])
    masks = [mask.mask(rows, rows) for mask in mechanism.attention_mask().by_heads(HEADS.query)]
    assert mechanism.is_causal == (not any(mask.triu(1).any() for mask in masks))


def attend_to(mechanism: Mechanism, rows: Rows) -> tuple[Tensor, Saved]:
    """Forward in float32, heads of 64."""
    *inputs, _ = inputs_of(mechanism, len(rows), HEADS, (64, 64), torch.float32)
    return plan_sequence_attention(mechanism, rows, HEADS, range(8), backend="cpu").forward(*inputs)


@pytest.mark.parametrize("mechanism", EXAMPLES, ids=str)
def test_what_a_kind_saves_is_what_it_says(mechanism: Mechanism) -> None:
    """The estimate of memory: a kind made of others may count inputs that these share more than once, but no less."""
    if Access.STATE in mechanism.accesses or Access.LIFETIMES in mechanism.accesses:
        pytest.skip("the estimate counts an out and a log-sum-exp, or leaves out the routing")
    if mechanism.unsupported_reason(HEADS, 1000) is not None:
        pytest.skip("its options are for shorter documents")
    rows = Rows.packed([1000])
    out, saved = attend_to(mechanism, rows)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (out, *saved.tensors)}
    stated = mechanism.saved_bytes(HEADS, Sizes.of(torch.float32, 64, 64), rows) * len(rows)
    assert 0.6 * stated <= sum(storages.values()) <= 1.1 * stated


@pytest.mark.parametrize("mechanism", examples(Routed) + examples(KVLifetime), ids=str)
def test_what_a_layer_keeps_of_its_choice_is_what_it_says(mechanism: Routed | KVLifetime) -> None:
    """On a CPU, as lists; what is packed for a device is compared in triton_kernels/interpreted_choice.py."""
    rows, (first, second) = Rows.packed([320]), choices_of_two_passes()
    planned = plan_sequence_attention(mechanism, rows, HEADS, range(8), backend="cpu")
    layers = [inputs_of(mechanism, len(rows), HEADS, dtype=torch.float32, seed=seed)[:-1] for seed in range(4)]
    with first:
        for inputs in layers:
            planned.forward(*inputs)
    with second:
        tensors = [x for _ in layers for x in tensors_of(kept(list))]
    storages = {x.untyped_storage().data_ptr(): x.nbytes for x in tensors}
    stated = len(layers) * mechanism.kept_bytes(HEADS, rows, tokens=len(rows), packed=False)
    if isinstance(mechanism, BlockSparse):
        # One pattern, however many layers.
        assert stated == 0
        assert len(storages) == len(tensors) // len(layers)
    else:
        # Tiles are few here, and choose by chance as many blocks as those of the estimate.
        assert sum(storages.values()) == pytest.approx(stated, rel=0.05)


def tensors_of(choice: Any) -> list[Tensor]:
    if isinstance(choice, Lifetimes):
        return [choice.columns]
    return [choice.offsets, choice.key_blocks]


MAY_BE_NEGATIVE = {"block_sparse.seed", "spans.alpha", "spans.beta", "sparge.similarity"}
MAY_BE_ZERO = {"lightning.layer", "spans.sinks", "vggt.frame", "vggt.special", "vmoba.brick", "window.sinks"}


def bad_options() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield a mechanism, an option, and the options of an example with a number there that makes no sense."""
    for name in MECHANISMS:
        for example in MECHANISMS.get(name).examples():
            options = {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(example).items()}  # pyright: ignore
            for key, value in options.items():
                numbers = value if isinstance(value, list) else [value]
                if not numbers or type(numbers[0]) not in (int, float):
                    continue
                bad = [math.nan, math.inf] if type(numbers[0]) is float else []
                if f"{name}.{key}" not in MAY_BE_NEGATIVE:
                    bad += [-1] if type(numbers[0]) is float or f"{name}.{key}" in MAY_BE_ZERO else [-1, 0]
                for number in bad:
                    yield name, key, {**options, key: [number, *value[1:]] if isinstance(value, list) else number}


def build(name: str, options: dict[str, Any]) -> None:
    """Make a mechanism as a configuration does, and its mask: grids and spans check what goes into theirs."""
    mechanism = from_tree(MECHANISMS.get(name), options)
    if isinstance(mechanism, Masked):
        mechanism.attention_mask()


def test_an_option_that_makes_no_sense_is_refused_by_its_name() -> None:
    refused = set()
    for name, key, options in bad_options():
        with pytest.raises((ValueError, ConfigError), match=rf"\b{key}\b"):
            build(name, options)
        refused.add(f"{name}.{key}")
    assert {"moba.top_k", "mosa.sparsity", "nats.penalty", "neighborhood.dilation", "vmoba.share"} <= refused
