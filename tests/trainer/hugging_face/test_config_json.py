"""The config.json of Hugging Face: what it describes, absent fields, and what farspan refuses by its name."""

import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from farspan.errors import ConfigError
from farspan.trainer.config import Config
from farspan.trainer.hugging_face.architectures import (
    ARCHITECTURES,
    LLAMA,
    MIXTRAL,
    QWEN3_MOE,
    Architecture,
)
from farspan.trainer.hugging_face.config_json import config_fields, pattern_of, read_config
from farspan.trainer.model.config import ExpertsConfig, ModelConfig
from farspan.trainer.toml_config import load_config
from farspan.trainer.weights.io import Decoder
from tests.support import hugging_face_models as ours

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EXPERTS = ours.EXPERTS


POSITIONS = {"max_position_embeddings": 512}


LLAMA_FIELDS = config_fields(Decoder(model=ours.MODEL), LLAMA) | POSITIONS


MOE = Decoder(model=replace(ours.MODEL, experts=EXPERTS, qk_norm=True))


MOE_FIELDS = config_fields(MOE, QWEN3_MOE) | POSITIONS


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
HALF_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 40, "low_freq_factor": 5.0}


UNKNOWN_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GemmaForCausalLM"]}, 'architectures=["GemmaForCausalLM"] and model_type="llama", but farspan'),
    ({"architectures": "LlamaForCausalLM"}, 'architectures="LlamaForCausalLM" and'),
    ({"architectures": [["LlamaForCausalLM"]]}, 'architectures=[["LlamaForCausalLM"]] and'),
    ({"architectures": {"0": "LlamaForCausalLM"}}, 'architectures={"0": "LlamaForCausalLM"} and'),
    ({"architectures": 3}, "architectures=3 and"),
    ({"architectures": None, "model_type": "gemma"}, 'architectures=[] and model_type="gemma"'),
    ({"model_type": "mistral"}, 'architectures=["LlamaForCausalLM"] and model_type="mistral"'),
    ({"is_causal": False}, "is_causal=false, but farspan computes true only: take a model with that"),
    ({"text_config": {"hidden_size": 64}}, 'text_config={"hidden_size": 64}, but farspan computes null only'),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"mlp_bias": True}, "mlp_bias=true"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu", but farspan computes "silu" only'),
    ({"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}'),
    ({"sliding_window": 64, "use_sliding_window": True}, "sliding_window=64; set it to null"),
    ({"farspan": {"backend": "cpu"}}, 'farspan={"backend": "cpu"} must have a mechanism and'),
    ({"farspan": {"mechanism": "mobba"}}, "'mobba' does not exist"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor=1.0, but farspan computes"),
    ({"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}}, "attention_factor=1.12"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "truncate=false"),
    ({"rope_scaling": {"full_attention": {"rope_theta": 1e4}}}, "parameters for full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"layer_types": ["sliding_attention"] * 2}, 'layer_types=["sliding_attention", "sliding_attention"]'),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, 'per_layer_config={"0": '),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0 must be at least 1"),
    ({"rope_scaling": ["yarn"]}, "has a field of the wrong type"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0 must be an integer"),
    ({"num_attention_heads": True}, "num_attention_heads=true must be an integer"),
    ({"vocab_size": "96"}, 'vocab_size="96" must be an integer'),
    ({"hidden_size": "32", "head_dim": None}, 'hidden_size="32" must be an integer'),
    ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6" must be a number'),
    ({"tie_word_embeddings": "no"}, 'tie_word_embeddings="no" must be true or false'),
    ({"max_position_embeddings": None}, "max_position_embeddings=null must be an integer"),
    ({"rope_theta": None}, "rope_theta=null of RoPE must be a number"),
    ({"rope_theta": 1}, "rope_theta=1.0 must be greater than 1"),
    ({"rope_scaling": {**YARN, "factor": "4"}}, 'factor="4" of RoPE must be a number'),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor=0.5 must be at least 1"),
    ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_slow=2.0 must be below beta_fast=1.0"),
    (
        {"rope_scaling": {**HALF_LLAMA3, "high_freq_factor": 4.0}},
        "low_freq_factor=5.0 must be below high_freq",
    ),
    ({"rope_scaling": HALF_LLAMA3}, "rope_type=llama3 has no high_freq_factor: add it"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4: 1, 2, 4 do"),
    ({"head_dim": 15}, "head_dim=15 must be even"),
]


@pytest.mark.parametrize(("changes", "message"), UNKNOWN_FIELDS)
def test_unsupported_fields_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_FIELDS | changes))
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert message in str(error.value)


QWEN2_FIELDS = LLAMA_FIELDS | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
}


OF_ONE_ARCHITECTURE: list[tuple[dict[str, Any], str]] = [
    ({**QWEN2_FIELDS, "layer_types": ["chunked_attention"] * 2}, 'layer_types=["chunked_attention", '),
    ({**QWEN2_FIELDS, "layer_types": ["sliding_attention"] * 3}, 'layer_types=["sliding_attention", '),
    ({**QWEN2_FIELDS, "sliding_window": None, "layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    (
        {**QWEN2_FIELDS, "max_window_layers": 0, "farspan": {"mechanism": "moba"}},
        "no layer may have a sliding",
    ),
    ({**QWEN2_FIELDS, "sliding_window": 0, "max_window_layers": 0}, "sliding_window=0 must be at least 1, or null"),
    ({**QWEN2_FIELDS, "max_window_layers": None}, "max_window_layers=null must be an integer"),
    ({**MOE_FIELDS, "decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
    ({**MOE_FIELDS, "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ({**MOE_FIELDS, "num_experts_per_tok": 9}, "num_experts_per_tok=9 must be from 1 to 5, the number of experts"),
    ({**MOE_FIELDS, "num_local_experts": 7}, "num_local_experts and num_experts differ"),
    ({**MOE_FIELDS, "router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 must be at least 0"),
    ({**MOE_FIELDS, "router_aux_loss_coef": None}, "router_aux_loss_coef=null must be a number"),
    ({**MOE_FIELDS, "attention_bias": True}, "attention_bias=true"),
]


@pytest.mark.parametrize(("fields", "message"), OF_ONE_ARCHITECTURE)
def test_unsupported_fields_of_an_architecture_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert message in str(error.value)


def test_a_config_that_is_unreadable_or_lacks_a_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    for text, message in (
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "holds no JSON object"),
        ("{}", r"architectures=\[\] and model_type=null"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path)


def read(tmp_path: Path, fields: dict[str, Any]) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_config(tmp_path)[1].model


def test_absent_fields_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    absent = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings", "hidden_act")
    old = read(tmp_path, {name: value for name, value in LLAMA_FIELDS.items() if name not in absent})
    assert (old.kv_heads, old.head_dim, old.rope.base, old.tied_embeddings) == (4, 8, 10_000.0, False)
    assert old.rope.original_positions == 512
    scaled = read(tmp_path, LLAMA_FIELDS | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).rope
    assert (scaled.scaling, scaled.factor, scaled.original_positions) == ("yarn", 4.0, 512)
    assert (scaled.beta_fast, scaled.beta_slow) == (32.0, 1.0)
    idle = read(tmp_path, LLAMA_FIELDS | {"rope_scaling": {**YARN, "factor": 1.0}, "sliding_window": None}).rope
    assert (idle.scaling, idle.factor) == ("none", 1.0)
    implied = read(tmp_path, LLAMA_FIELDS | {"rope_scaling": {**YARN, "factor": None, "attention_factor": 1.138629436}})
    assert implied.rope.factor == 4.0


MODEL_KEYS = {
    "vocab_size": "vocabulary_size", "hidden_size": "width", "intermediate_size": "feed_forward",
    "num_hidden_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "norm_epsilon", "tie_word_embeddings": "tied_embeddings",
    "max_position_embeddings": "rope.original_positions",
}  # fmt: skip  # fmt: skip


def test_names_that_transformers_takes_are_taken(tmp_path: Path) -> None:
    """`architectures` may be absent; the number of experts has two names."""
    expected = read(tmp_path, MOE_FIELDS)
    named = {name: MOE_FIELDS[name] for name in MOE_FIELDS if name not in ("architectures", "num_experts")}
    assert read(tmp_path, named | {"num_local_experts": 5}) == expected
    mixtral = {**named, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": 24}
    assert read(tmp_path, mixtral | {"num_experts": 5}).experts.count == 5


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_a_config_without_fields_is_the_default_of_transformers(architecture: Architecture, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(architecture.model_type)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture.name]}))
    decoder = read_config(tmp_path)[1]
    for name, key in MODEL_KEYS.items():
        assert attrgetter(key)(decoder.model) == getattr(theirs, name), name
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert decoder.model.head_dim == head_dim
    assert decoder.model.rope.base == theirs.rope_parameters["rope_theta"]
    windows = {getattr(mechanism, "window", None) for mechanism in decoder.mechanisms()}
    assert windows == {getattr(theirs, "sliding_window", None)}
    if architecture.expert_tensors:
        experts, layers = decoder.model.experts, theirs.num_hidden_layers
        assert experts.per_token == theirs.num_experts_per_tok
        assert (experts.count, experts.feed_forward, experts.normalized) == (
            (8, 14336, True) if architecture is MIXTRAL else (128, 768, False)
        )
        assert experts.balance_loss == pytest.approx(0.001 * experts.per_token / layers, rel=1e-5)


def test_the_released_llama_is_the_model_of_our_preset(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    released = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {**scaling, "original_max_position_embeddings": 8192},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    assert read(tmp_path, released) == load_config(Config, CONFIGS / "llama3_8b_128k.toml").model


def test_layers_with_experts_are_a_short_pattern(tmp_path: Path) -> None:
    fields = MOE_FIELDS | {"num_hidden_layers": 6}
    assert read(tmp_path, fields).experts.layers == "experts"
    assert read(tmp_path, fields | {"decoder_sparse_step": 3}).experts.layers == "dense*2, experts"
    assert read(tmp_path, fields | {"mlp_only_layers": [0, 5]}).expert_layers == (False, True, True, True, True, False)
    assert read(tmp_path, fields | {"mlp_only_layers": [*range(6)]}).experts == ExpertsConfig()
    assert pattern_of(["dense", "experts", "experts", "dense", "dense"]) == "dense, experts*2, dense"
    assert pattern_of(["dense", "experts", "experts", "dense", "experts"]) == "dense, experts*2"
    # Even loads: transformers counts choices of a token and takes the mean over layers, ours takes the sum.
    fields |= {"router_aux_loss_coef": 0.3, "mlp_only_layers": [0, 5]}
    assert read(tmp_path, fields).experts.balance_loss == pytest.approx(0.3 * 2 / 4)
    # Where every token takes all experts it would be constant.
    assert read(tmp_path, fields | {"num_experts_per_tok": fields["num_experts"]}).experts.balance_loss == 0
