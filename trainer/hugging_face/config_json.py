"""The `config.json` of Hugging Face, from and to a decoder; values that farspan does not compute are refused."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from farspan.errors import ConfigError, shortened
from farspan.trainer.hugging_face.architectures import ARCHITECTURES, MIXTRAL, PLUG_IN, QWEN2, Architecture, windows_of
from farspan.trainer.model.config import RopeConfig
from farspan.trainer.toml_config import from_tree
from farspan.trainer.validate import heads_fit, rope_scaling_is_complete
from farspan.trainer.weights.io import Decoder
from farspan.trainer.weights.source_files import CONFIG_FILE

Fields = Mapping[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"
COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "router_jitter_noise": (0.0, None),
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "text_config": (None,),
    "quantization_config": (None,),
}
"""Fields with the only values that farspan computes, which are the defaults."""
TYPES = {bool: ("true or false", (bool,)), int: ("an integer", (int,)), float: ("a number", (int, float))}
NULLABLE = {"num_key_value_heads", "head_dim", "sliding_window", "tie_word_embeddings"}
"""Fields that older versions of transformers wrote as null, whatever their default is."""
THEIR_NAMES = {
    "vocabulary_size": "vocab_size", "width": "hidden_size", "feed_forward": "intermediate_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "norm_epsilon": "rms_norm_eps", "tied_embeddings": "tie_word_embeddings", "rope.base": "rope_theta",
    "rope.original_positions": "(original_)max_position_embeddings", "rope.low_frequency_factor": "low_freq_factor",
    "rope.high_frequency_factor": "high_freq_factor", "experts.feed_forward": "moe_intermediate_size",
    "experts.balance_loss": "router_aux_loss_coef",
}  # fmt: skip
"""Fields in place of settings of `[model]` in messages; of others, the last part is the field."""
ADAPTER_FILE = "adapter_config.json"
ROPE_NUMBERS = {
    "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
}  # fmt: skip
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")


def read_config(folder: Path) -> tuple[Architecture, Decoder]:
    """Raises ConfigError for a model that farspan does not compute."""
    path = folder / CONFIG_FILE
    if (folder / ADAPTER_FILE).is_file():
        raise ConfigError(
            f"{folder} has an adapter, {ADAPTER_FILE}, which farspan does not add to the weights: merge it into them "
            "with peft's merge_and_unload, and save the model without it."
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: name the folder of a Hugging Face model.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): download or save the model again.") from None
    fields = read_json(path, content)
    try:
        architecture = architecture_in(fields)
        decoder = from_tree(Decoder, _tree(fields, architecture))
        decoder.mechanisms()
        heads_fit(decoder.model)
        rope_scaling_is_complete(decoder.model.rope)
        return architecture, decoder
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{path} has a field of the wrong type ({error}): save the model again.") from None
    except ConfigError as error:
        problem = re.sub(r"\bmodel\.([a-z_.]*[a-z])", _their_name, str(error))
        raise ConfigError(f"{path} describes a model that farspan does not train: {problem}") from None


def _their_name(setting: re.Match[str]) -> str:
    return THEIR_NAMES.get(setting[1], setting[1].rpartition(".")[2])


def architecture_in(fields: Fields) -> Architecture:
    """Return the architecture that `config.json` names; raises ConfigError where farspan does not compute it.

    transformers follows `model_type` alone, so that `architectures` may be absent, but must not be another.
    """
    names, model_type = fields.get("architectures") or [], fields.get("model_type")
    for architecture in ARCHITECTURES.values():
        is_named = isinstance(names, list) and names[:1] == [architecture.name]
        if model_type == architecture.model_type and (is_named or not names):
            return architecture
        if model_type is None and is_named:
            return architecture
    raise ConfigError(
        f"architectures={shortened(json.dumps(names))} and model_type={shortened(json.dumps(model_type))}, but farspan "
        f"computes {', '.join(ARCHITECTURES)} only, each with its own model_type: take one of these models."
    )


def read_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the object in a file with this content; raises ConfigError where it is none."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): download or save the model again.") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no JSON object: download or save the model again.")
    return fields


def balance_loss_of(coefficient: float, per_token: int, layers: int) -> float:
    """Return `model.experts.balance_loss` for `router_aux_loss_coef`, so that even loads give the same loss.

    transformers computes E sum_i f_i P_i with f_i in choices per token, which add up to `per_token`, and takes the mean
    over layers; here f_i add up to 1, and the losses of layers are added.
    """
    return float(f"{coefficient * per_token / layers:.6g}")


def pattern_of(layers: Sequence[str]) -> str:
    """Return the shortest pattern that repeats for layers of these names, as `parse_pattern` reads it."""
    total = len(layers)
    length = next(n for n in range(1, total + 1) if all(layers[i] == layers[i % n] for i in range(total)))
    runs = [(name, len(list(run))) for name, run in groupby(layers[:length])]
    return ", ".join(name if times == 1 else f"{name}*{times}" for name, times in runs)


def _tree(fields: Fields, architecture: Architecture) -> dict[str, Any]:
    """Return the tree of a Decoder."""
    _check_types(fields, architecture.defaults)
    for name, computed in COMPUTED.items():
        # The biases of Qwen2 do not depend on the field.
        if fields.get(name, computed[0]) not in computed and not (architecture is QWEN2 and name == "attention_bias"):
            value = shortened(json.dumps(fields[name]))
            raise ConfigError(
                f"{name}={value}, but farspan computes {json.dumps(computed[0])} only: take a model with that."
            )
    attention, experts = _attention(fields, architecture), _experts(fields, architecture)
    fields = {**architecture.defaults, **fields}
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if heads < 1:
        raise ConfigError(f"num_attention_heads={heads} must be at least 1.")
    model = {
        "layers": fields["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": fields["num_key_value_heads"] or heads,
        "head_dim": fields["head_dim"] or architecture.defaults["head_dim"] or width // heads,
        "feed_forward": fields["intermediate_size"],
        "vocabulary_size": fields["vocab_size"],
        "norm_epsilon": fields["rms_norm_eps"],
        "qk_norm": architecture.qk_norm,
        "qkv_bias": architecture.qkv_bias,
        "tied_embeddings": fields["tie_word_embeddings"] or False,
        "rope": _rope(fields, architecture.base),
        "experts": experts,
    }
    return {"model": model, "attention": attention}


def _check_types(fields: Fields, defaults: Fields) -> None:
    for name, default in defaults.items():
        value, (description, kinds) = fields.get(name, default), TYPES.get(type(default), ("", ()))
        if kinds and type(value) not in kinds and not (value is None and name in NULLABLE):
            raise ConfigError(f"{name}={shortened(json.dumps(value))} must be {description}.")


def _attention(given: Fields, architecture: Architecture) -> dict[str, Any]:
    """Return the tree of an AttentionConfig."""
    fields = {**architecture.defaults, **given}
    window, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if architecture.windows == "none":
        if window is not None and given.get("use_sliding_window"):
            raise ConfigError(
                f"sliding_window={window}; set it to null there and give runs attention.mechanism=window."
            )
        window = None
    # The others have no such switch: their window is on wherever it is set.
    if "use_sliding_window" in architecture.defaults and not fields["use_sliding_window"]:
        window = None
    if window is not None and window < 1:
        raise ConfigError(f"sliding_window={window} must be at least 1, or null where all tokens are attended to.")
    first = fields.get("max_window_layers", 0) if architecture.windows == "some layers" else 0
    types = [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
    asked = given.get("layer_types")
    if asked is not None and asked != types:
        is_computed = architecture.windows == "some layers" and len(asked) == layers and {*asked} <= {SLIDING, FULL}
        if not is_computed or (window is None and SLIDING in asked):
            raise ConfigError(
                f"layer_types={shortened(json.dumps(asked))} is not what {architecture.name} computes in {layers} "
                f"layers with sliding_window={json.dumps(window)}: correct one of them."
            )
        types = asked
    entry = given.get(PLUG_IN)
    if entry is not None:
        if SLIDING in types or not isinstance(entry, dict) or not entry.keys() <= {"mechanism", "options"}:
            raise ConfigError(
                f"{PLUG_IN}={shortened(json.dumps(entry))} must have a mechanism and, maybe, options, and no layer may "
                "have a sliding window besides: remove one of both."
            )
        return entry
    if SLIDING not in types:
        return {}
    if FULL not in types:
        return {"mechanism": "window", "options": {"window": window}}
    pattern = pattern_of(["window" if kind == SLIDING else "dense" for kind in types])
    return {"mechanism": pattern, "options": {"window": {"window": window}}}


def _experts(given: Fields, architecture: Architecture) -> dict[str, Any]:
    if not architecture.expert_tensors:
        return {}
    fields = {**architecture.defaults, **given}
    # transformers takes either name for every architecture.
    given_counts = {name: given[name] for name in ("num_local_experts", "num_experts") if name in given}
    if len({*given_counts.values()}) > 1:
        raise ConfigError(f"num_local_experts and num_experts differ ({given_counts}): remove one of them.")
    count = next(iter(given_counts.values()), fields[architecture.expert_count])
    layers, per_token = range(fields["num_hidden_layers"]), fields["num_experts_per_tok"]
    without, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step", 1)
    if not step:
        raise ConfigError(f"decoder_sparse_step={step} must be at least 1.")
    has_experts = [count != 0 and layer not in without and (layer + 1) % step == 0 for layer in layers]
    if not any(has_experts):
        return {}
    if not 1 <= per_token <= count:
        raise ConfigError(f"num_experts_per_tok={per_token} must be from 1 to {count}, the number of experts.")
    balance_loss = balance_loss_of(fields["router_aux_loss_coef"], per_token, sum(has_experts))
    return {
        "count": count,
        "per_token": per_token,
        "feed_forward": fields[architecture.expert_size],
        "layers": pattern_of(["experts" if is_mixture else "dense" for is_mixture in has_experts]),
        "normalized": True if architecture is MIXTRAL else fields["norm_topk_prob"],
        # Constant, and refused, where every token takes all experts.
        "balance_loss": balance_loss if per_token < count else 0.0,
        "balance_over": "step",
    }


def _rope(fields: Fields, base: float) -> dict[str, Any]:
    """Return the tree of a RopeConfig from `rope_theta` and `rope_scaling` or, in newer files, `rope_parameters`."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3", "yarn"):
        raise ConfigError(
            f"rope_type={kind}, but farspan computes default, llama3 and yarn only: take a model with one of these."
        )
    for name, value in rope.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"RoPE has parameters for {name}, but farspan computes the same in all layers only: take a model with "
                "one set of them."
            )
    for name, value in {**fields, **rope}.items():
        is_number = type(value) in (int, float) or (value is None and name not in ROPE_FIELDS)
        if name in ROPE_NUMBERS and not is_number:
            raise ConfigError(f"{name}={shortened(json.dumps(value))} of RoPE must be a number.")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ConfigError(
            f"partial_rotary_factor={partial}, but farspan rotates all of a head in {', '.join(ARCHITECTURES)}: take a "
            "model without it."
        )
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
        for name in ("low_freq_factor", "high_freq_factor"):
            if name not in rope:
                raise ConfigError(f"rope_type=llama3 has no {name}: add it.")
        return tree | {
            "low_frequency_factor": rope["low_freq_factor"],
            "high_frequency_factor": rope["high_freq_factor"],
        }
    return tree | {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}


def _check_yarn(rope: Fields, factor: float) -> None:
    """Refuse another attention factor than the paper's, and a ramp that is not rounded."""

    def attention_factor(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    given, origin = rope.get("attention_factor"), ""
    if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        given = attention_factor(rope["mscale"]) / attention_factor(rope["mscale_all_dim"])
        origin = f"mscale={rope['mscale']} with mscale_all_dim={rope['mscale_all_dim']}, "
    ours = attention_factor(1.0)
    if given is not None and not math.isclose(given, ours, rel_tol=1e-6):
        raise ConfigError(
            f"YaRN's {origin}attention_factor={given}, but farspan computes 0.1 ln(factor) + 1 = {ours} only: take a "
            "model with that."
        )
    if not rope.get("truncate", True):
        raise ConfigError(
            "YaRN's truncate=false, but farspan computes the rounded ramp of the released code only: take a model with "
            "truncate=true."
        )


def config_fields(decoder: Decoder, architecture: Architecture) -> dict[str, Any]:
    """Return the fields of `config.json` that follow from a decoder, as both transformers 4 and 5 read them."""
    model = decoder.model
    windows = windows_of(architecture, model, decoder.mechanisms())
    fields = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
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
        "rope_theta": model.rope.base,
        "rope_scaling": _rope_scaling(model.rope),
        **_window_fields([None] * model.layers if windows is None else windows, architecture),
    }
    if windows is None:
        # Without the plug-in, transformers refuses to load a model with an implementation that it does not know.
        entry = {"mechanism": decoder.attention.mechanism, "options": decoder.attention.options}
        fields |= {PLUG_IN: entry, "attn_implementation": PLUG_IN}
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


def with_changes(given: Fields, before: Fields, now: Fields, *, rope_changed: bool) -> dict[str, Any]:
    """Return the `config.json` of the model that weights came from, with what training has changed.

    before, now: what `config_fields` gives for the decoder that was imported and the one to be exported.
    rope_changed: whether to write the fields of RoPE, even if they are equal.
    """
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    if "architectures" in changed:
        changed = {*before, *now}  # other defaults for fields that are absent
    if rope_changed or changed & {*ROPE_FIELDS}:
        changed |= {*ROPE_FIELDS}
    kept = {name: value for name, value in given.items() if name not in changed or name in now}
    return kept | {name: now[name] for name in now if name in changed}


def _window_fields(windows: Sequence[int | None], architecture: Architecture) -> dict[str, Any]:
    window = next(filter(None, windows), None)
    if architecture.windows == "none":
        return {}
    if "use_sliding_window" not in architecture.defaults:
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False}
    fields = {"use_sliding_window": True, "sliding_window": window}
    if architecture.windows == "some layers":
        # Older versions of transformers know no layer_types: windows from a layer on.
        fields["max_window_layers"] = windows.index(window)
        fields["layer_types"] = [FULL if each is None else SLIDING for each in windows]
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
