"""Hugging Face files that farspan refuses, by the name of field, file or tensor; a refused import writes nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.errors import CheckpointError, ConfigError, FarspanError
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.hugging_face.architectures import LLAMA, MIXTRAL, QWEN3_MOE, architecture_of
from farspan.trainer.hugging_face.config_json import config_fields, pattern_of, read_config
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, ModelConfig
from farspan.trainer.toml_config import load_config
from farspan.trainer.weights.io import Decoder, StoredWeights, find_trained_model
from tests.support import hugging_face_models as ours

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EXPERTS = ours.EXPERTS
ONE_LAYER = replace(ours.MODEL, layers=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `run`, and its export in `theirs`, in several files."""
    folder = tmp_path_factory.mktemp("refused")
    decoder = Decoder(model=ONE_LAYER)
    run = ours.save_run(ours.random_model(decoder), decoder, folder / "run")
    export_model(run, folder / "theirs", file_bytes=20_000)
    return folder


@pytest.fixture
def theirs(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported model, to damage."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in (exported / "theirs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(FarspanError) as error:
        import_model(folder, folder.parent / "weights")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "\n" not in str(error.value)
    return str(error.value)


POSITIONS = {"max_position_embeddings": 512}
LLAMA_FIELDS = config_fields(Decoder(model=ours.MODEL), LLAMA) | POSITIONS
MOE = Decoder(model=replace(ours.MODEL, experts=EXPERTS, qk_norm=True))
MOE_FIELDS = config_fields(MOE, QWEN3_MOE) | POSITIONS
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
UNKNOWN_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM"),
    ({"architectures": None}, "architecture none"),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"mlp_bias": True}, "mlp_bias=true"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu", but farspan computes "silu" only'),
    ({"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}'),
    ({"sliding_window": 64, "use_sliding_window": True}, "sliding_window=64; set it to null"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {**YARN, "attention_factor": 1.0}}, "attention_factor=1.0, but farspan computes"),
    ({"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0}}, "attention_factor=1.12"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "truncate=false"),
    ({"num_hidden_layers": 0}, "model.layers=0 must be at least 1"),
    ({"vocab_size": "96"}, 'model.vocabulary_size="96" must be an integer'),
    ({"hidden_size": "32", "head_dim": None}, "has a field of the wrong type"),
]


@pytest.mark.parametrize(("changes", "message"), UNKNOWN_FIELDS)
def test_unsupported_fields_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_FIELDS | changes))
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path)
    assert message in str(error.value)


def test_a_config_that_is_unreadable_or_lacks_a_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    for text, message in (("{", "cannot be read"), ("[1]", "architecture none")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path)
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 40}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_FIELDS | {"rope_scaling": scaling}))
    with pytest.raises(ConfigError, match="has no low_freq_factor, which LlamaForCausalLM needs"):
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


def test_incomplete_files_are_refused(theirs: Path) -> None:
    index = json.loads((theirs / "model.safetensors.index.json").read_text())
    last = theirs / sorted(set(index["weight_map"].values()))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    assert f"{last} is damaged" in refused(theirs)
    last.write_bytes(b"")
    assert f"{last} is damaged" in refused(theirs)
    last.unlink()
    assert f"{last} is missing" in refused(theirs)
    last.write_bytes(content)
    index["weight_map"]["lm_head.weight"] = sorted(set(index["weight_map"].values()))[0]
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks lm_head.weight" in refused(theirs)
    (theirs / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json is damaged" in refused(theirs)
    (theirs / "model.safetensors.index.json").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(theirs)


def test_tensors_of_another_model_are_refused(exported: Path, theirs: Path) -> None:
    tensors = {}
    for file in sorted(theirs.glob("*.safetensors")):
        tensors |= safetensors.load_file(file)
        file.unlink()
    (theirs / "model.safetensors.index.json").unlink()

    def with_changes(**changes: torch.Tensor | None) -> str:
        made = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        safetensors.save_file(made, theirs / "model.safetensors")
        return refused(theirs)

    query, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    assert f"has no tensor {norm}" in with_changes(**{norm: None})
    message = with_changes(**{query: torch.zeros(8, 32)})
    assert f"has {query} of shape [8, 32], not [64, 32]" in message
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert f"has {bias}, which is not in LlamaForCausalLM" in with_changes(**{bias: torch.zeros(64)})
    assert f"has {norm} in torch.int8" in with_changes(**{norm: torch.ones(32, dtype=torch.int8)})
    # Written by older versions of transformers.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    safetensors.save_file(tensors | extra, theirs / "model.safetensors")
    import_model(theirs, theirs.parent / "weights")
    with pytest.raises(CheckpointError, match="weights exists already"):
        import_model(theirs, theirs.parent / "weights")


def test_fused_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    decoder = Decoder(model=replace(ONE_LAYER, experts=EXPERTS))
    run = ours.save_run(ours.random_model(decoder), decoder, tmp_path / "run")
    export_model(run, theirs)
    tensors = safetensors.load_file(theirs / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    mixture = "model.layers.0.mlp."
    fused[f"{mixture}gate.weight"] = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    fused[f"{mixture}experts.gate_up_proj"] = torch.zeros(5, 46, 32)
    safetensors.save_file(fused, theirs / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj of shape \[5, 46, 32\], not \[5, 48, 32\]"):
        import_model(theirs, tmp_path / "weights")


def test_without_the_package_it_is_named(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"need the package safetensors: `pip install -e '\.\[hf\]'`"):
        import_model(exported / "theirs", tmp_path / "weights")
    with pytest.raises(ConfigError, match="need the package safetensors"):
        export_model(exported / "run", tmp_path / "out")
    assert not list(tmp_path.iterdir())


SIGMOID = replace(EXPERTS, score="sigmoid")
NO_ARCHITECTURE: list[tuple[dict[str, Any], str]] = [
    ({"parallel_blocks": True}, "model.parallel_blocks=True does not exist in LlamaForCausalLM"),
    ({"key_convolution": 3}, "model.key_convolution=3 does not exist in LlamaForCausalLM"),
    ({"head_mixture": HeadMixtureConfig(kind="heads")}, "model.head_mixture.kind='heads'"),
    ({"rope": replace(ours.YARN, rotated=8)}, "model.rope.rotated=8 does not exist in LlamaForCausalLM"),
    ({"width": 30}, "model.heads=4 must divide model.width=30 in LlamaForCausalLM"),
    ({"experts": SIGMOID, "qk_norm": True}, "model.experts.score='sigmoid' does not exist in Qwen3MoeForCausalLM"),
    ({"experts": replace(EXPERTS, shared=8)}, "model.experts.shared=8 does not exist in MixtralForCausalLM"),
    ({"experts": replace(EXPERTS, capacity=1.5)}, "model.experts.capacity=1.5"),
    ({"experts": replace(EXPERTS, choice="experts")}, "model.experts.choice='experts'"),
    ({"experts": replace(EXPERTS, scale=2.5)}, "model.experts.scale=2.5"),
    ({"experts": replace(EXPERTS, bias_rate=0.1)}, "model.experts.bias_rate=0.1"),
    ({"experts": replace(EXPERTS, count=6, groups=3)}, "model.experts.groups=3"),
    ({"experts": replace(EXPERTS, normalized=False)}, "model.experts.normalized=False"),
    ({"experts": replace(EXPERTS, layers="experts, dense")}, "model.experts.layers='experts, dense'"),
]


@pytest.mark.parametrize(("changes", "message"), NO_ARCHITECTURE)
def test_models_without_an_architecture_are_not_exported(changes: dict[str, Any], message: str) -> None:
    decoder = Decoder(model=replace(ours.MODEL, **changes))
    with pytest.raises(ConfigError) as error:
        architecture_of(decoder.model, decoder.mechanisms())
    assert message in str(error.value)


def test_choosing_from_all_groups_is_choosing_without_groups() -> None:
    model = replace(ours.MODEL, experts=replace(EXPERTS, count=6, groups=3, groups_per_token=3))
    assert architecture_of(model, Decoder(model=model).mechanisms()) is MIXTRAL


@pytest.mark.parametrize(
    ("mechanism", "options", "named"),
    [
        ("moba", {}, "MoBA("),
        ("lightning", {}, "Lightning("),
        ("dense", {"causal": False}, "Dense(causal=False)"),
        ("window", {"window": 40, "sinks": 4}, "Window(window=40, sinks=4"),
        ("dense, window", {}, "dense and window=1024 in its layers, which MistralForCausalLM"),
    ],
)
def test_other_mechanisms_are_not_exported(mechanism: str, options: dict[str, Any], named: str) -> None:
    mechanisms = AttentionConfig(mechanism=mechanism, options=options).build_mechanisms(2)
    with pytest.raises(ConfigError) as error:
        architecture_of(ours.MODEL, mechanisms)
    assert f"attention.mechanism has {named}" in str(error.value)
    assert "`--as dense`" in str(error.value)


def test_routers_with_biases_are_not_exported(tmp_path: Path) -> None:
    decoder = Decoder(model=replace(ONE_LAYER, experts=EXPERTS))
    model = ours.random_model(decoder)
    model.get_buffer("blocks.0.feed_forward.bias")[2] = 0.5
    run = ours.save_run(model, decoder, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"has biases of experts \(blocks\.0\.feed_forward\.bias\)"):
        export_model(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_is_found_by_its_run_by_its_step_and_by_its_file(exported: Path, tmp_path: Path) -> None:
    run = find_trained_model(exported / "run")
    step = find_trained_model(exported / "run" / "checkpoints" / "step_00000001")
    assert run == step
    assert run.decoder.model == ONE_LAYER
    import_model(exported / "theirs", tmp_path / "weights")
    assert find_trained_model(tmp_path / "weights").decoder.model == ours.replaced_positions(ONE_LAYER, 512)
    with pytest.raises(CheckpointError, match="is not a trained model"):
        find_trained_model(tmp_path)


def test_weights_that_are_damaged_or_of_another_model_are_refused(exported: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    import_model(exported / "theirs", weights)
    # As older versions wrote them.
    (weights / "manifest.json").unlink()
    described = (weights / "model.toml").read_text()
    (weights / "model.toml").write_text(described.replace("width = 32", "width = 16"))
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape \[96, 32\], not"):
        export_model(weights, tmp_path / "out")
    (weights / "model.toml").write_text(described.replace("[model]", "[model]\nqk_norm = true"))
    with pytest.raises(CheckpointError, match=r"query_norm\.weight is missing"):
        export_model(weights, tmp_path / "out")
    (weights / ".metadata").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"is damaged \(\.metadata is unreadable: "):
        StoredWeights(weights)
    (weights / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        StoredWeights(weights)
    assert not (tmp_path / "out").exists()
