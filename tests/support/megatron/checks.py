"""What layers refuse, and what they share; run on ranks of a context-parallel group of two."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import farspan
from farspan.errors import ConfigError
from farspan.integrations.megatron import Mechanisms, layer_spec, packed_seq_params, shard
from tests.support.megatron.cases import Case
from tests.support.megatron.steps import build, group_of

LAYERS = 3
DENSE_BOTH_WAYS = farspan.mechanism("dense", causal=False)


def attention_of(layer: Any) -> Any:
    """The spec of the attention in a layer's spec."""
    return layer.submodules.self_attention.submodules.core_attention


def core_attention(
    mechanism: Mechanisms = "dense", strategy: str = "ring", layer_number: int = 1, mask: str = "causal", **options: Any
) -> Any:
    """Build the attention of a layer as Megatron does."""
    build_options = {key: options.pop(key) for key in ("attention_type", "attention_dropout") if key in options}
    config = TransformerConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "attention_dropout": 0.0,
            "context_parallel_size": 2,
            **options,
        }
    )
    given = {
        "attn_mask_type": AttnMaskType[mask],
        "attention_type": "self",
        "cp_comm_type": "p2p",
        "softmax_scale": config.softmax_scale,
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
    }
    return attention_of(layer_spec(mechanism, strategy))(
        config=config, layer_number=layer_number, **{**given, **build_options}
    )


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of four heads, k and v of two."""
    return tuple(torch.randn(*shape, heads, 8) for heads in (4, 2, 2))  # pyright: ignore[reportReturnType]


def options_that_attention_lacks_are_refused() -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"attention_dropout": 0.1},
        {"softmax_type": "learnable"},
        {"softmax_type": "off-by-one"},
        {"qk_clip": True},
        {"fp8_dot_product_attention": True},
        {"multi_latent_attention": True},
        {"attention_type": "cross"},
    )
    for options in refused:
        (key,) = options
        with pytest.raises(ConfigError, match=f"supports {key}="):
            core_attention(**options)
    with pytest.raises(ConfigError, match=r"attention_dropout=0\.0 only, not 0\.2"):
        core_attention(attention_dropout=0.2)


def mechanisms_that_do_not_fit_are_refused() -> None:
    for mechanism in (farspan.mechanism("mosa"), farspan.mechanism("nats")):
        with pytest.raises(ConfigError, match="has a router"):
            core_attention(mechanism)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=2"):
        core_attention("lightning", tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match="2 entries for 3 layers"):
        core_attention(["dense", "moba"])
    with pytest.raises(ConfigError, match="'ulysses'"):
        core_attention(strategy="ulysses", num_attention_heads=3, num_query_groups=3, hidden_size=24)


def windows_narrow_dense_attention_only() -> None:
    window: dict[str, Any] = {"window_size": (6, 0), "window_attn_skip_freq": 2}
    found = [core_attention(layer_number=layer, **window).mechanism for layer in (1, 2)]
    assert found == [farspan.mechanism("window", window=7), farspan.mechanism("dense")]
    assert core_attention(window_size=(-1, 0)).mechanism == farspan.mechanism("dense")
    refused: tuple[dict[str, Any], ...] = ({"mechanism": "moba", **window}, {"window_size": (6, 1)})
    for options in refused:
        with pytest.raises(ConfigError, match="window_size"):
            core_attention(**options)


def masks_are_those_of_the_mechanism() -> None:
    q, k, v = inputs(4, 1)
    causal, both_ways = core_attention(), core_attention(DENSE_BOTH_WAYS, mask="no_mask")
    both_ways(q, k, v, None, attn_mask_type=AttnMaskType.padding)
    causal(q, k, v, None, attn_mask_type=AttnMaskType.padding_causal)
    for mechanism, mask in (("dense", "no_mask"), ("dense", "arbitrary"), (DENSE_BOTH_WAYS, "causal")):
        with pytest.raises(ConfigError, match=f"attn_mask_type='{mask}'"):
            core_attention(mechanism, mask=mask)
    with pytest.raises(ConfigError, match="attn_mask_type='causal_bottom_right'"):
        causal(q, k, v, None, attn_mask_type=AttnMaskType.causal_bottom_right)
    mask = torch.ones(1, 1, 4, 4).triu(1).bool()
    with pytest.raises(ConfigError, match="qkv_format='bshd'"):
        causal(q, k, v, None, packed_seq_params=PackedSeqParams(qkv_format="bshd"))
    for given in ({"attention_mask": mask}, {"attention_mask": None, "attention_bias": mask}):
        with pytest.raises(ConfigError, match="takes no attention_mask"):
            causal(q, k, v, **given)


def mechanisms_go_by_the_number_of_their_layer() -> None:
    by_name = [core_attention(["dense", "moba", "window"], layer_number=layer).mechanism for layer in (1, 2, 3)]
    assert by_name == [farspan.mechanism(name) for name in ("dense", "moba", "window")]
    of_token_prediction = core_attention([*["dense"] * LAYERS, "moba"], layer_number=LAYERS + 1, mtp_num_layers=1)
    assert of_token_prediction.mechanism == farspan.mechanism("moba")
    by_number = core_attention(lambda layer: farspan.mechanism("window", window=layer), layer_number=3)
    assert by_number.mechanism == farspan.mechanism("window", window=3)
    lightning = core_attention("lightning", layer_number=2).mechanism
    assert lightning == farspan.mechanism("lightning", layer=1, layers=LAYERS)


def packed_documents_lie_zigzag_each() -> None:
    """Rank 0 has the first and the last of four chunks of each document; 0 is padding."""
    packed = packed_seq_params([5, 4], pad_to_multiple_of=8)
    assert packed.cu_seqlens_q.tolist() == [0, 5, 9]
    assert packed.cu_seqlens_q_padded.tolist() == packed.cu_seqlens_kv_padded.tolist() == [0, 8, 16]
    assert (packed.qkv_format, packed.max_seqlen_q) == ("thd", 8)
    group: Any = group_of("context_parallel")
    found = shard(torch.arange(1, 10)[None], packed, group=group, dim=1).tolist()
    assert found == [[[1, 2, 0, 0, 6, 7, 0, 0], [3, 4, 5, 0, 8, 9, 0, 0]][group.rank()]]
    # Empty documents, as of tensors of a fixed length, and one that is all padding.
    unpadded = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4, 8, 8, 8]))
    assert shard(torch.arange(8), unpadded, group=group).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]][group.rank()]
    assert shard(torch.arange(9), packed).tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 5, 6, 7, 8, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="documents have 9 tokens together, the tensor has 8"):
        shard(torch.arange(8), packed, group=group)
    with pytest.raises(ConfigError, match="multiple of 4"):
        shard(torch.arange(9), packed_seq_params([5, 4]), group=group)


def the_device_is_asked_once_for_lengths() -> None:
    asked: list[Tensor] = []

    def counted(x: Tensor, diff: Callable[..., Tensor] = Tensor.diff) -> Tensor:
        if any(x is known for known in (given.cu_seqlens_q, own.cu_seqlens_q)):
            asked.append(x)
        return diff(x)

    attend, other = core_attention(), core_attention(farspan.mechanism("window", window=3))
    given = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4, 16], dtype=torch.int32))
    own = packed_seq_params([12, 4])
    q, k, v = inputs(8)
    with mock.patch.object(Tensor, "diff", counted):
        first = attend(q, k, v, None, packed_seq_params=given)
        assert asked
        asked.clear()
        other(q, k, v, None, packed_seq_params=given)
        second = attend(q, k, v, None, packed_seq_params=own)
        assert not asked
        # Who writes other lengths into the tensor has them.
        given.cu_seqlens_q.copy_(own.cu_seqlens_q)
        torch.testing.assert_close(attend(q, k, v, None, packed_seq_params=given), second, rtol=0, atol=0)
    assert not first.equal(second)


def a_batch_of_one_rank_stays_on_it() -> None:
    q, k, v = inputs(6, 1)
    alone = PackedSeqParams(qkv_format="sbhd", local_cp_size=1)
    found = core_attention()(q, k, v, None, packed_seq_params=alone)
    wanted = farspan.attention(q[:, 0], k[:, 0], v[:, 0])  # [s, 1, heads, d] -> [s, heads, d]
    torch.testing.assert_close(found[:, 0], wanted.flatten(1), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="local_cp_size=2"):
        core_attention()(q, k, v, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd", local_cp_size=2))


def layers_share_plans_and_a_sharded_state_has_none() -> None:
    model = build(Case(cp=2))
    first, second = (layer.self_attention.core_attention for layer in model.decoder.layers)
    assert first.context_parallel is second.context_parallel
    names = model.sharded_state_dict()
    assert "decoder.layers.0.self_attention.linear_proj.weight" in names
    assert not [name for name in (*names, *model.state_dict()) if "core_attention" in name]


def specs_of_blocks_are_copied() -> None:
    config = TransformerConfig(num_layers=LAYERS, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
    base: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec = layer_spec("moba", base_spec=base)
    chosen = [attention_of(layer) for layer in spec.layer_specs]
    assert [one.params["mechanism"] for one in chosen] == ["moba"] * LAYERS
    untouched = [attention_of(layer) for layer in base.layer_specs]
    assert not set(map(id, chosen)) & set(map(id, untouched))
