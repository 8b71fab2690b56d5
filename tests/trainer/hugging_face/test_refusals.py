"""Hugging Face files that farspan refuses, by the name of file or tensor; a refused import writes nothing."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.errors import CheckpointError, ConfigError, FarspanError
from farspan.trainer.config import AttentionConfig
from farspan.trainer.hugging_face import convert
from farspan.trainer.hugging_face.architectures import LLAMA, MISTRAL, MIXTRAL, QWEN2, architecture_of, windows_of
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.model.config import HeadMixtureConfig
from farspan.trainer.weights import pool_heads
from farspan.trainer.weights.io import Decoder, StoredWeights, find_trained_model
from tests.support import hugging_face_models as ours

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS = ours.EXPERTS
ONE_LAYER = replace(ours.MODEL, layers=1)


def refused(folder: Path) -> str:
    with pytest.raises(FarspanError) as error:
        import_model(folder, folder.parent / "weights")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert "\n" not in str(error.value)
    return str(error.value)


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


def test_tensors_of_another_model_are_refused(theirs: Path, tensors: dict[str, torch.Tensor]) -> None:
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


def test_files_that_differ_are_refused_and_extra_tensors_are_read(theirs: Path) -> None:
    """As transformers does, tensors are read from all files that the index names, whether it lists them or not."""
    first, last = sorted(theirs.glob("*.safetensors"))[:2]
    name = next(iter(safetensors.load_file(first)))
    kept = safetensors.load_file(last)
    value = safetensors.load_file(first)[name]
    safetensors.save_file(kept | {name: value + 1}, last)
    assert f"{last} and {first.name} have different numbers in {name}" in refused(theirs)
    bias = "model.layers.0.self_attn.q_proj.bias"
    safetensors.save_file(kept | {bias: torch.zeros(64)}, last)
    assert f"has {bias}, which is not in LlamaForCausalLM" in refused(theirs)
    derived = "model.layers.0.self_attn.rotary_emb.inv_freq"
    safetensors.save_file(kept | {name: value, derived: torch.ones(8)}, last)
    index = json.loads((theirs / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    import_model(theirs, theirs.parent / "weights")
    export_model(theirs.parent / "weights", theirs.parent / "out")
    assert derived in safetensors.load_file(theirs.parent / "out" / "model.safetensors")


def test_an_adapter_beside_the_weights_is_refused(theirs: Path) -> None:
    (theirs / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "has an adapter, adapter_config.json, which farspan does not add" in refused(theirs)
    (theirs / "config.json").unlink()
    assert "has an adapter, adapter_config.json" in refused(theirs)


def test_an_existing_output_is_refused_before_tensors_are_read(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(convert, "TensorFiles", None)
    with pytest.raises(CheckpointError, match="out exists already"):
        import_model(theirs, tmp_path / "out")
    monkeypatch.setattr(pool_heads, "StoredWeights", None)
    with pytest.raises(CheckpointError, match="out exists already"):
        pool_heads.pool_heads(tmp_path / "nowhere", 1, tmp_path / "out")


def test_a_missing_output_head_names_the_way_out(theirs: Path, tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]
    safetensors.save_file(tensors, theirs / "model.safetensors")
    message = "has no tensor lm_head.weight, but tie_word_embeddings=false in its config.json: set that to true"
    assert message in refused(theirs)


def test_an_unreadable_generation_config_is_refused(theirs: Path) -> None:
    (theirs / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read" in refused(theirs)


def test_one_file_comes_before_an_index_as_in_transformers(theirs: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.save_file(tensors, theirs / "model.safetensors")
    (theirs / "model.safetensors.index.json").write_text("{}")
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
    ("mechanism", "options"),
    [
        ("moba", {}),
        ("dense", {"causal": False}),
        ("window", {"window": 40, "sinks": 4}),
        ("dense, window", {}),
    ],
)
def test_other_mechanisms_take_the_plug_in(mechanism: str, options: dict[str, Any]) -> None:
    mechanisms = AttentionConfig(mechanism=mechanism, options=options).build_mechanisms(2)
    assert architecture_of(ours.MODEL, mechanisms) is LLAMA
    assert architecture_of(ours.MODEL, mechanisms, MISTRAL) is MISTRAL
    assert windows_of(LLAMA, ours.MODEL, mechanisms) is None
    with_bias = replace(ours.MODEL, qkv_bias=True)
    assert architecture_of(with_bias, mechanisms) is QWEN2
    # Qwen2 has windows in some layers.
    assert windows_of(QWEN2, with_bias, mechanisms) == ([None, 1024] if mechanism == "dense, window" else None)


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
