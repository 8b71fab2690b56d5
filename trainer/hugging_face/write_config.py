"""From a ModelConfig to the `config.json` of Hugging Face."""

from typing import Any

from farspan.trainer.hugging_face.architectures import Architecture
from farspan.trainer.model.config import ModelConfig, RopeConfig


def config_fields(
    model: ModelConfig, architecture: Architecture, *, positions: int, dtype: str, end_id: int | None
) -> dict[str, Any]:
    """Return the fields of `config.json`, in the form that transformers 4 and 5 both read.

    positions: context length of the training. end_id: the end-of-document token, None if unknown.
    """
    fields = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "torch_dtype": dtype,
        "vocab_size": model.vocabulary_size,
        "hidden_size": model.width,
        "intermediate_size": model.feed_forward,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": positions,
        "rope_theta": model.rope.base,
        "rope_scaling": _rope_scaling(model.rope),
        # Documents do not start with a token here; without the field, transformers takes Llama's.
        "bos_token_id": None,
        "eos_token_id": end_id,
    }
    names = architecture.experts
    if names is None:
        return fields
    layers, experts = model.expert_layers, model.experts
    fields |= {
        names.count: experts.count,
        names.size: experts.feed_forward,
        "num_experts_per_tok": experts.per_token,
        # The inverse of `balance_loss_of`.
        "router_aux_loss_coef": float(f"{experts.balance_loss * sum(layers) / experts.per_token:.6g}"),
    }
    if architecture.qk_norm:
        fields |= {
            "norm_topk_prob": experts.normalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, has_experts in enumerate(layers) if not has_experts],
        }
    return fields


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling = {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_positions,
    }
    if rope.scaling == "llama3":
        return scaling | {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
    return scaling | {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
