"""The `config.json` of Hugging Face, from and to a ModelConfig; fields that farspan does not compute are refused."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from farspan.errors import ConfigError, shortened
from farspan.trainer.hugging_face.architectures import ARCHITECTURES, MIXTRAL, QWEN3, Architecture
from farspan.trainer.model.config import ModelConfig, RopeConfig
from farspan.trainer.toml_config import from_tree

Fields = Mapping[str, Any]
CONFIG_FILE = "config.json"
QWEN3_HEAD_DIM = 128
"""The default of transformers for a `config.json` of Qwen3 without head_dim."""
REQUIRED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
"""Fields with the only value that farspan computes."""


def read_config(folder: Path) -> tuple[Architecture, ModelConfig]:
    """Raises ConfigError for a model that farspan does not compute."""
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: name the folder of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): download or save the model again.") from None
    names = (fields.get("architectures") if isinstance(fields, dict) else None) or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ConfigError(
            f"{path} has the architecture {names[0]}, which farspan does not import: take a model of one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[names[0]]
    try:
        return architecture, from_tree(ModelConfig, _model(fields, architecture), "model")
    except KeyError as error:
        raise ConfigError(f"{path} has no {error.args[0]}, which {architecture.name} needs: add it.") from None
    except TypeError as error:
        raise ConfigError(f"{path} has a field of the wrong type ({error}): save the model again.") from None
    except ConfigError as error:
        raise ConfigError(f"{path} describes a model that farspan does not train: {error}") from None


def balance_loss_of(coefficient: float, per_token: int, layers: int) -> float:
    """Return `model.experts.balance_loss` for `router_aux_loss_coef`, so that even loads give the same loss.

    transformers computes E sum_i f_i P_i with f_i in choices per token, which add up to `per_token`, and takes the mean
    over layers; here f_i add up to 1, and the losses of layers are added.
    """
    return float(f"{coefficient * per_token / layers:.6g}")


def pattern_of(has_experts: Sequence[bool]) -> str:
    """Return `model.experts.layers` for these layers, as the shortest pattern that repeats."""
    total = len(has_experts)
    length = next(n for n in range(1, total + 1) if all(has_experts[i] == has_experts[i % n] for i in range(total)))
    names = ("experts" if is_mixture else "dense" for is_mixture in has_experts[:length])
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    return ", ".join(name if times == 1 else f"{name}*{times}" for name, times in runs)


def _model(fields: Fields, architecture: Architecture) -> dict[str, Any]:
    """Return the tree of a ModelConfig; raises KeyError for a missing field."""
    for name, supported in REQUIRED.items():
        if fields.get(name, supported) != supported:
            value = shortened(json.dumps(fields[name]))
            raise ConfigError(f"{name}={value}, but farspan computes {json.dumps(supported)} only.")
    # Mixtral has no use_sliding_window: its window is on wherever it is set.
    if fields.get("sliding_window") is not None and fields.get("use_sliding_window", architecture is MIXTRAL):
        raise ConfigError(
            f"sliding_window={fields['sliding_window']}; set it to null there and give runs attention.mechanism=window."
        )
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = fields.get("head_dim") or (QWEN3_HEAD_DIM if architecture is QWEN3 else width // heads)
    return {
        "layers": fields["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "feed_forward": fields["intermediate_size"],
        "vocabulary_size": fields["vocab_size"],
        "norm_epsilon": fields["rms_norm_eps"],
        "qk_norm": architecture.qk_norm,
        "tied_embeddings": fields.get("tie_word_embeddings", False),
        "rope": _rope(fields, architecture.base),
        "experts": _experts(fields, architecture),
    }


def _experts(fields: Fields, architecture: Architecture) -> dict[str, Any]:
    if not architecture.expert_tensors:
        return {}
    count = fields["num_local_experts"] if "num_local_experts" in fields else fields[architecture.expert_count]
    layers, per_token = range(fields["num_hidden_layers"]), fields["num_experts_per_tok"]
    without, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step", 1)
    has_experts = [layer not in without and (layer + 1) % step == 0 for layer in layers]
    if not any(has_experts):
        return {}
    coefficient = fields.get("router_aux_loss_coef", 0.0)
    return {
        "count": count,
        "per_token": per_token,
        "feed_forward": fields[architecture.expert_size],
        "layers": pattern_of(has_experts),
        "normalized": True if architecture is MIXTRAL else fields["norm_topk_prob"],
        "balance_loss": balance_loss_of(coefficient, per_token, sum(has_experts)),
        "balance_over": "step",
    }


def _rope(fields: Fields, base: float) -> dict[str, Any]:
    """Return the tree of a RopeConfig from `rope_theta` and `rope_scaling` or, in newer files, `rope_parameters`."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3", "yarn"):
        raise ConfigError(f"rope_type={kind}, but farspan computes default, llama3 and yarn only.")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor={partial}, but {', '.join(ARCHITECTURES)} rotate all of a head.")
    positions = fields["max_position_embeddings"]
    tree = {"base": rope.get("rope_theta", fields.get("rope_theta", base)), "original_positions": positions}
    if kind == "default":
        return tree
    original = fields.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", positions))
    factor = rope.get("factor") or positions / original
    tree |= {"original_positions": original}
    if kind == "yarn":
        _check_yarn(rope, factor)
    if factor == 1:
        return tree
    tree |= {"scaling": kind, "factor": factor}
    if kind == "llama3":
        return tree | {
            "low_frequency_factor": rope["low_freq_factor"],
            "high_frequency_factor": rope["high_freq_factor"],
        }
    return tree | {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}


def _check_yarn(rope: Fields, factor: float) -> None:
    """Refuse another attention factor than the paper's, and a ramp that is not rounded."""

    def attention_factor(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    given = rope.get("attention_factor")
    if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        given = attention_factor(rope["mscale"]) / attention_factor(rope["mscale_all_dim"])
    ours = attention_factor(1.0)
    if given is not None and not math.isclose(given, ours, rel_tol=1e-6):
        raise ConfigError(f"YaRN's attention_factor={given}, but farspan computes 0.1 ln(factor) + 1 = {ours} only.")
    if not rope.get("truncate", True):
        raise ConfigError("YaRN's truncate=false, but farspan computes the rounded ramp of the released code only.")


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
    if not architecture.expert_tensors:
        return fields
    layers, experts = model.expert_layers, model.experts
    fields |= {
        architecture.expert_count: experts.count,
        architecture.expert_size: experts.feed_forward,
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
