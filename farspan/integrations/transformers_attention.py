"""The attention and mask functions that transformers calls; they know its arguments, and import nothing of it.

Legend: B sequences of a batch, T queries, S keys, H heads, Hk KV heads, D head dim.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.integrations.host_values import HostValues
from farspan.kernels.mechanism import Mechanism
from farspan.parallel.context_parallel.api import ContextParallel, attention, mechanism
from farspan.parallel.context_parallel.eager import eager
from farspan.trainer.config import AttentionConfig
from farspan.trainer.hugging_face.architectures import ARCHITECTURES, PLUG_IN
from farspan.trainer.toml_config import from_tree

MODEL_TYPES = {architecture.model_type for architecture in ARCHITECTURES.values()}
Documents = tuple[tuple[int, ...], ...]
"""Lengths of the documents of each sequence of a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardedBatch:
    """What layers need to know of a batch whose sequences are sharded."""

    context_parallel: ContextParallel
    documents: Documents


@eager
def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sharded_batch: ShardedBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return attention `[B, T, H, D]` of query `[B, H, T, D]` to key and value `[B, Hk, S, D]`; transformers calls it.

    With more keys than queries, as after a KV cache, queries are the last. attention_mask: see `padding_mask`.
    Raises ConfigError for what farspan does not compute.
    """
    _refuse_others(module.config, attention_mask, dropout, others)
    # [B, H, T, D] -> [B, T, H, D]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    default = q.shape[-1] ** -0.5
    if scaling is not None and scaling != default:
        q = q * (scaling / default)
    chosen = _mechanism(module, sliding_window)
    if sharded_batch is not None:
        return sharded_batch.context_parallel.attention(
            q, k, v, mechanism=chosen, documents=sharded_batch.documents
        ), None
    documents = documents_of(
        q.shape[0], k.shape[1], attention_mask, position_ids, cu_seq_lens_q, only_last=q.shape[1] < k.shape[1]
    )
    return attention(q, k, v, mechanism=chosen, documents=documents), None


@eager
def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor | None:
    """Return which of the keys are no padding, bool `[B, S]`, or None if all are; transformers calls it once a pass."""
    if use_vmap:
        raise ConfigError(
            "attn_implementation='farspan' takes no mask functions: choose a mechanism that has that mask."
        )
    if q_offset + q_length != kv_offset + kv_length:
        raise ConfigError(
            "attn_implementation='farspan' takes no cache of a fixed length: set cache_implementation='dynamic'."
        )
    if attention_mask is None:
        return None
    # A cache of a sliding window has the last keys only.
    attention_mask = attention_mask[:, -kv_length:]
    return None if attention_mask.all() else attention_mask


def _refuse_others(config: Any, attention_mask: Tensor | None, dropout: float, others: Mapping[str, Any]) -> None:
    """Raise ConfigError for what transformers passes on and farspan does not compute."""
    problem = None
    if config.model_type not in MODEL_TYPES:
        problem = f"computes models of type {', '.join(sorted(MODEL_TYPES))}, not {config.model_type}"
    elif dropout:
        problem = f"has no dropout: set attention_dropout=0.0 instead of {dropout}"
    elif others.get("output_attentions"):
        problem = "makes no attention weights: set output_attentions=False"
    elif attention_mask is not None and attention_mask.dim() != 2:
        problem = f"takes attention_mask [batch, tokens] alone, not {list(attention_mask.shape)}"
    elif not getattr(config, "is_causal", True) or others.get("is_causal") is False:
        problem = "computes causal models: set is_causal=True"
    else:
        unknown = [name for name in ("head_mask", "softcap", "s_aux", "position_bias") if others.get(name) is not None]
        if unknown:
            problem = f"does not compute {unknown[0]}: leave it out"
    if problem is not None:
        raise ConfigError(f"attn_implementation='farspan' {problem}.")


def _mechanism(module: Any, sliding_window: int | None) -> str | Mechanism:
    """Return the mechanism of a layer: of the entry `farspan` in its config, or else what the stock model computes."""
    config = module.config
    entry = getattr(config, PLUG_IN, None)
    if entry is None:
        return "dense" if sliding_window is None else mechanism("window", window=sliding_window)
    if sliding_window is not None:
        raise ConfigError(
            f"config.sliding_window={sliding_window} besides config.farspan={entry}: set it to None, and make the "
            "window a mechanism if layers are to have one."
        )
    return _mechanisms(json.dumps(entry), config.num_hidden_layers)[module.layer_idx]


@lru_cache(16)
def _mechanisms(entry: str, layers: int) -> tuple[Mechanism, ...]:
    """Return the mechanism of each layer for the entry `farspan`, as JSON."""
    fields = json.loads(entry)
    if not isinstance(fields, dict) or not fields.keys() <= {"mechanism", "options"}:
        raise ConfigError(f"config.farspan={entry} may have only the keys mechanism and options.")
    try:
        mechanisms = from_tree(AttentionConfig, fields).build_mechanisms(layers)
    except ConfigError as error:
        raise ConfigError(f"config.farspan={entry} does not work: {error}") from None
    for chosen in mechanisms:
        if chosen.routing_width:
            raise ConfigError(f"config.farspan has {chosen}, whose router no model of transformers has: take another.")
    return mechanisms


_FOUND: HostValues[Documents | None] = HostValues()
"""Documents by the tensor that they were found in."""


def documents_of(
    batch: int,
    keys: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    *,
    only_last: bool = False,
) -> Documents | None:
    """Return the lengths of documents; None where each sequence is one. Padding counts as documents of its own.

    As transformers does for its flash attention: lengths that are passed come first, then padding, then positions that
    do not count on.
    """
    if cu_seq_lens is not None:
        tensor, find = cu_seq_lens, _of_cumulative_lengths
    elif attention_mask is not None:
        tensor, find = attention_mask, _of_padding
    elif position_ids is not None and not only_last:
        tensor, find = position_ids, _of_positions
    else:
        return None
    documents = _FOUND.get(tensor, lambda: find(tensor, batch), key=batch)
    if documents is not None and any(sum(lengths) != keys for lengths in documents):
        raise ConfigError(
            f"documents of {documents} tokens do not make up {batch} sequences of {keys}: cu_seq_lens_q, "
            "attention_mask and position_ids have to be of all tokens."
        )
    return documents


def _of_cumulative_lengths(cu_seq_lens: Tensor, batch: int) -> Documents:
    return (tuple(length for length in cu_seq_lens.diff().tolist() if length),) * batch


def _of_padding(attention_mask: Tensor, batch: int) -> Documents:
    """Return padding before, tokens, and padding after, for each row of a mask `[B, S]`."""
    real = attention_mask.bool()
    runs = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(dim=1)
    columns = torch.stack((real.long().argmax(dim=1), real.sum(dim=1), runs)).t().tolist()  # 3 x [B] -> [B, 3]
    if any(count > 1 for *_, count in columns):
        raise ConfigError(
            "attention_mask hides tokens between others, which attn_implementation='farspan' does not compute: pad "
            "before or after all tokens of a sequence."
        )
    length = real.shape[1]
    parts = ((before, tokens, length - before - tokens) for before, tokens, _ in columns)
    return tuple(tuple(part for part in row if part) for row in parts)


def _of_positions(position_ids: Tensor, batch: int) -> Documents | None:
    """Return the lengths between positions, `[B or 1, S]`, that do not follow on each other."""
    follows = position_ids.diff(dim=1) == 1
    if follows.all():
        return None
    starts = [[0, *((~row).nonzero().flatten() + 1).tolist(), len(row) + 1] for row in follows.cpu()]
    lengths = tuple(tuple(b - a for a, b in pairwise(row)) for row in starts)
    return lengths * (batch // len(lengths))
