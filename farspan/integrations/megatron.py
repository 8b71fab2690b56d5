"""Megatron-Core: farspan's attention as the `core_attention` of a `GPTModel`, inside Megatron's own parallelism.

    spec = layer_spec(farspan.mechanism("moba", block=512, top_k=8), strategy="ring")
    model = GPTModel(config, transformer_layer_spec=spec, position_embedding_type="rope", ...)

Eight tokens on two ranks, where Megatron puts them: zigzag over the sequence, or, if documents are packed (`thd`), over
each of them by itself:

    one sequence                  rank 0: 0 1 6 7     rank 1: 2 3 4 5
    two documents of 4 tokens     rank 0: 0 3 4 7     rank 1: 1 2 5 6
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.errors import ConfigError
from farspan.integrations.host_values import HostValues
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import Mechanism
from farspan.kernels.planner import Heads
from farspan.parallel.context_parallel import api
from farspan.parallel.context_parallel.cost_model import strategy_for
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.parallel.layout import Shards

try:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.utils import is_layer_window_attention
except ImportError as error:
    raise ConfigError(
        f"farspan.integrations.megatron cannot import {error.name}: pip install 'farspan[megatron]', and triton, which "
        "newer releases of Megatron-Core import without asking for it."
    ) from error

Mechanisms = str | Mechanism | Sequence[str | Mechanism] | Callable[[int], str | Mechanism]
"""One for all layers, one for each layer, or a function of the layer's number, which Megatron counts from 1."""

CAUSAL, BIDIRECTIONAL = ("causal", "padding_causal"), ("no_mask", "padding")
"""Names of `AttnMaskType`. Padding is what no document of `PackedSeqParams` has."""
SUPPORTED = {
    "attention_dropout": 0.0,
    "softmax_type": "vanilla",
    "qk_clip": False,
    "log_max_attention_logit": False,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "multi_latent_attention": False,
}
"""Fields of `TransformerConfig` that change attention, and the only value that this one has."""


def layer_spec(
    mechanism: Mechanisms = "moba",
    strategy: str = "ring",
    *,
    base_spec: ModuleSpec | TransformerBlockSubmodules | None = None,
    node_ranks: int = 1,
    backend: str = "auto",
) -> Any:
    """Return a copy of a layer spec whose self-attention is farspan's, for `GPTModel(transformer_layer_spec=...)`.

    mechanism: by name or as `farspan.mechanism` returns it; see `Mechanisms`. strategy, node_ranks and backend: as of
    `farspan.ContextParallel`; the group is Megatron's. base_spec: of one layer, or of a block whose layers differ;
    without one, Megatron's local spec.

    Layers raise ConfigError, on every rank, for what they cannot do as Megatron's config asks.
    """
    spec: Any = get_gpt_layer_local_spec() if base_spec is None else copy.deepcopy(base_spec)
    # Layers share a group's traffic and plans.
    context_parallel = cache(lambda group: api.ContextParallel(group, strategy, node_ranks=node_ranks, backend=backend))
    layers: Any = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
            module=CoreAttention, params={"mechanism": mechanism, "context_parallel": context_parallel}
        )
    return spec


class CoreAttention(nn.Module):
    """What a spec of `layer_spec` builds in place of `DotProductAttention`; Megatron gives all but the last two."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        mechanism: Mechanisms,
        context_parallel: Callable[[dist.ProcessGroup | None], api.ContextParallel],
    ) -> None:
        """cp_comm_type: how Transformer Engine communicates; the strategy decides that here. Raises ConfigError."""
        super().__init__()
        given = {} if attention_dropout is None else {"attention_dropout": attention_dropout}
        for key, supported in SUPPORTED.items():
            if (value := given.get(key, getattr(config, key))) != supported:
                raise ConfigError(f"farspan's attention supports {key}={supported!r} only, not {value!r}: change it.")
        if attention_type != "self":
            raise ConfigError(f"farspan's attention supports attention_type='self' only, not {attention_type!r}.")
        self.mechanism = _with_window(_of_layer(mechanism, config, layer_number), config, layer_number)
        self.attn_mask_type = attn_mask_type
        _check_mechanism(self.mechanism, attn_mask_type, config.tensor_model_parallel_size)
        # Scores are scaled by head_dim ** -0.5 later.
        self.query_scale = 1.0 if softmax_scale is None else softmax_scale * config.kv_channels**0.5
        self._of_group = context_parallel
        group: Any = None
        # The group may exist though this model does not use it.
        if config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp
        self.context_parallel = context_parallel(group)
        tensor = config.tensor_model_parallel_size
        heads = Heads(query=config.num_attention_heads // tensor, kv=max(config.num_query_groups // tensor, 1))
        _check_strategy(self.context_parallel, self.mechanism, heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend q `[s_local, b, heads, d]` to k and v `[s_local, b, kv_heads, d]`; return `[s_local, b, heads * d]`.

        Heads are those of a tensor-parallel rank. Packed documents come as `[t_local, heads, d]`, and go as `[t_local,
        heads * d]`. Raises ConfigError for a mask or a bias, and for documents that the ranks cannot share.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ConfigError(
                "farspan's attention takes no attention_mask and no attention_bias, as the mechanism is the mask: pass "
                "None (--no-create-attention-mask-in-dataloader), and PackedSeqParams to keep documents apart."
            )
        if packed_seq_params is not None and packed_seq_params.qkv_format not in ("thd", "sbhd", None):
            raise ConfigError(f"qkv_format={packed_seq_params.qkv_format!r} is not sbhd or thd: use one of these.")
        _check_mask_type(self.mechanism, attn_mask_type or self.attn_mask_type)
        shared = self._context_of(packed_seq_params)
        query = query if self.query_scale == 1.0 else query * self.query_scale
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            shards = _shards(packed_seq_params, shared.channel.size)
            out = shared.attention(query, key, value, mechanism=self.mechanism, documents=shards)
            return out.flatten(1)  # [t, heads, d] -> [t, heads * d]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [s, b, heads, d] -> [b, s, heads, d]
        out = shared.attention(q, k, v, mechanism=self.mechanism)
        return out.transpose(0, 1).flatten(2)  # [b, s, heads, d] -> [s, b, heads * d]

    def _context_of(self, packed: PackedSeqParams | None) -> api.ContextParallel:
        """Return the group of this batch: hybrid context parallelism takes another for each."""
        if packed is None or (packed.cp_group is None and packed.local_cp_size is None):
            return self.context_parallel
        if packed.cp_group is None and packed.local_cp_size != 1:
            raise ConfigError(f"local_cp_size={packed.local_cp_size} wants its group: set cp_group in PackedSeqParams.")
        return self._of_group(packed.cp_group)


def packed_seq_params(
    documents: Sequence[int], *, pad_to_multiple_of: int = 1, device: torch.device | str = "cpu"
) -> PackedSeqParams:
    """Return the parameters of packed documents (`thd`) of these lengths, each padded to a multiple.

    The host keeps the lengths of these: layers do not wait for the device to learn them. pad_to_multiple_of: twice the
    context-parallel ranks, times the tensor-parallel ones under sequence parallelism.
    """
    padded = [-(-length // pad_to_multiple_of) * pad_to_multiple_of for length in documents]
    ends = []
    for lengths in (documents, padded):
        tensor = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
        _LENGTHS.put(tensor, tuple(lengths))
        ends.append(tensor)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends[0],
        cu_seqlens_kv=ends[0],
        cu_seqlens_q_padded=ends[1],
        cu_seqlens_kv_padded=ends[1],
        max_seqlen_q=max(padded),
        max_seqlen_kv=max(padded),
    )


def shard(
    x: Tensor, packed: PackedSeqParams, *, group: dist.ProcessGroup | None = None, dim: int = 0, fill: int | float = 0
) -> Tensor:
    """Return this rank's part of a tensor that has all tokens of packed documents along `dim`, without padding.

    group: the context-parallel group; without one all tokens are returned. Padding of documents is `fill`. Sequences
    that are not packed are `farspan.shard`'s. Raises ConfigError for documents that the ranks cannot share, ValueError
    where these do not have as many tokens as x.
    """
    rank, degree = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    shards = _shards(packed, degree)
    if len(shards.rows) != x.shape[dim]:
        raise ValueError(f"documents have {len(shards.rows)} tokens together, the tensor has {x.shape[dim]}")
    return shards.shard(x.movedim(dim, 0), rank, fill=fill).movedim(0, dim)


_LENGTHS: HostValues[tuple[int, ...]] = HostValues()
"""Of each cu_seqlens tensor the lengths between its elements."""


def _lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Return the lengths between cumulative ones; the first layer that asks waits for the device, the others do not."""
    return _LENGTHS.get(cu_seqlens, lambda: tuple(cu_seqlens.diff().tolist()))


def _shards(packed: PackedSeqParams, degree: int) -> Shards:
    lengths = _lengths(packed.cu_seqlens_q)
    padded = lengths if packed.cu_seqlens_q_padded is None else _lengths(packed.cu_seqlens_q_padded)
    return _zigzag_by_document(lengths, padded, degree)


@lru_cache(api.PLANS)
def _zigzag_by_document(lengths: tuple[int, ...], padded: tuple[int, ...], degree: int) -> Shards:
    """Shard packed documents so that rank r of P has chunks r and 2P-1-r of each, padding counted."""
    layout = "contiguous" if degree == 1 else "zigzag"
    index, first = [torch.empty(degree, 0, dtype=torch.int64)], 0
    for length, padded_length in zip(lengths, padded, strict=True):
        if degree > 1 and padded_length % (2 * degree):
            raise ConfigError(
                f"{degree} context-parallel ranks cannot share a document of {padded_length} tokens: pad each to "
                f"a multiple of {2 * degree} (cu_seqlens_q_padded)."
            )
        of_one = Shards.build(Rows.packed([padded_length]), layout=layout, degree=degree).index
        index.append((of_one + first).masked_fill(of_one >= length, -1))
        first += length
    rows = Rows.packed([length for length in lengths if length])
    return Shards(rows=rows, index=torch.cat(index, dim=1))  # documents x [P, T_d] -> [P, T]


def _of_layer(mechanisms: Mechanisms, config: Any, layer_number: int) -> Mechanism:
    layers = config.num_layers + (config.mtp_num_layers or 0)  # those of multi-token prediction are numbered last
    if isinstance(mechanisms, str | Mechanism):
        chosen = mechanisms
    elif callable(mechanisms):
        chosen = mechanisms(layer_number)
    elif len(mechanisms) != layers:
        raise ConfigError(f"mechanism has {len(mechanisms)} entries for {layers} layers: give one for each layer.")
    else:
        chosen = mechanisms[layer_number - 1]
    chosen = api.mechanism(chosen) if isinstance(chosen, str) else chosen
    return chosen.in_layer(layer_number - 1, layers)


def _with_window(mechanism: Mechanism, config: Any, layer_number: int) -> Mechanism:
    """Return dense attention narrowed to Megatron's window_size, (keys before the query, keys after it)."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return mechanism
    before, after = config.window_size
    if mechanism != api.mechanism("dense") or after > 0:
        raise ConfigError(
            f"window_size={config.window_size} narrows causal dense attention only, and layer {layer_number} has "
            f"{mechanism}: leave window_size out, and use farspan.mechanism('window', window=..., causal=...)."
        )
    return mechanism if before < 0 else api.mechanism("window", window=before + 1)


def _check_mechanism(mechanism: Mechanism, attn_mask_type: Any, tensor_parallel: int) -> None:
    if mechanism.routing_width:
        raise ConfigError(
            f"{mechanism} has a router, for which Megatron's layers have no place: use another mechanism."
        )
    if mechanism.heads_differ and tensor_parallel > 1:
        raise ConfigError(
            f"{mechanism} has heads that differ, which tensor_model_parallel_size={tensor_parallel} would number anew "
            "on each rank: set it to 1."
        )
    _check_mask_type(mechanism, attn_mask_type)


def _check_mask_type(mechanism: Mechanism, attn_mask_type: Any) -> None:
    if attn_mask_type.name not in (CAUSAL if mechanism.is_causal else BIDIRECTIONAL):
        raise ConfigError(
            f"attn_mask_type={attn_mask_type.name!r} is not what {mechanism} does: set it in the spec's self_attention "
            f"to {'causal' if mechanism.is_causal else 'no_mask'}, or use a mechanism of that mask."
        )


def _check_strategy(shared: api.ContextParallel, mechanism: Mechanism, heads: Heads) -> None:
    """Raise ConfigError, before a model is built, for what the first layer would refuse."""
    degree, inner = shared.channel.size, shared.channel.inner_size
    if degree == 1 or shared.strategy == "auto":
        return
    strategy = STRATEGIES.get(strategy_for(shared.strategy, mechanism, heads, degree, inner))
    if reason := strategy.unsupported_reason(mechanism, heads, degree, inner):
        raise ConfigError(reason)
