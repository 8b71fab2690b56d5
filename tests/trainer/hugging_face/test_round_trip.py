"""Import and export against transformers: the same logits in float32, the same bits back."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.model.config import RopeConfig
from farspan.trainer.weights.io import Decoder, StoredWeights
from tests.support import hugging_face_models as ours

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 320,
    # As large as trained weights: logits of tiny random ones hardly differ.
    "initializer_range": 0.1,
}
# With the default ramp, heads of 16 would not differ.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 2.0, "beta_slow": 0.25}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 40,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama, MHA, tied, head_dim absent": (
        "Llama",
        {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, yarn": ("Qwen3", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, windows in the last layers": (
        "Qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1},
    ),
    "qwen3, windows in some layers": (
        "Qwen3",
        {
            "sliding_window": 37,
            "use_sliding_window": True,
            "num_hidden_layers": 3,
            "layer_types": LAYER_TYPES,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 37}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    # Runs are refused, as the loss would not train the router; the model is what it is.
    "mixtral, one expert of each token": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 1}),
    "mixtral, window": ("Mixtral", {"num_local_experts": 3, "sliding_window": 37}),
    "qwen3 moe, window": ("Qwen3Moe", {**MOE, "sliding_window": 37, "use_sliding_window": True}),
    "qwen3 moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen3 moe, not normalized, dense layers": (
        "Qwen3Moe",
        {**MOE, "norm_topk_prob": False, "decoder_sparse_step": 2, "num_hidden_layers": 5, "mlp_only_layers": [1]},
    ),
}
UNSCALED = RopeConfig(original_positions=512)
MODEL = replace(ours.MODEL, rope=UNSCALED)
EXPERTS = replace(ours.EXPERTS, balance_loss=0.01, balance_over="step")
OURS = {
    "LlamaForCausalLM": replace(MODEL, rope=ours.LLAMA3, tied_embeddings=True),
    "Qwen3ForCausalLM": replace(MODEL, qk_norm=True, rope=ours.YARN),
    "MixtralForCausalLM": replace(MODEL, experts=EXPERTS, feed_forward=24),
    "Qwen3MoeForCausalLM": replace(
        MODEL, layers=3, qk_norm=True, experts=replace(EXPERTS, layers="experts, dense", normalized=False)
    ),
}


def random_model(name: str) -> Any:
    """One of `THEIRS`, with random norms and biases."""
    kind, fields = THEIRS[name]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES | fields))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # A bias of keys of ones would be hidden by the softmax.
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    return model


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return model.eval()(ours.TOKENS[None]).logits[0]


assert_bits = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_model_has_their_logits(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    decoder = import_model(tmp_path / "theirs", tmp_path / "weights")
    expected = their_logits(model)
    assert expected.std() > 0.1
    assert (ours.logits(decoder, tmp_path / "weights") - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_fused_in_the_file_are_the_same(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    shapes = import_model(tmp_path / "plain", tmp_path / "of_plain").shapes()
    import_model(tmp_path / "fused", tmp_path / "of_fused")
    plain, fused = (StoredWeights(tmp_path / folder) for folder in ("of_plain", "of_fused"))
    assert_bits(read(plain, shapes), read(fused, shapes))


@pytest.mark.parametrize("name", OURS)
def test_an_exported_run_has_our_logits_and_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    decoder = Decoder(model=OURS[name])
    run = ours.save_run(ours.random_model(decoder), decoder, tmp_path / "run")
    assert export_model(run, tmp_path / "out", file_bytes=20_000).name == name
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert type(loaded).__name__ == name
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    files = [safetensors.load_file(file) for file in (tmp_path / "out").glob("model-*-of-*.safetensors")]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files]
    assert len(files) > 1
    assert all(size <= 20_000 or len(tensors) == 1 for size, tensors in zip(sizes, files, strict=True))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    expected = ours.logits(decoder, run / "checkpoints" / "step_00000001")
    assert expected.std() > 0.1
    assert (their_logits(loaded) - expected).abs().max() <= 1e-5
    assert loaded.config.max_position_embeddings == 512
    # No document starts with a token, and the data that would name the one at its end is not there.
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (None, None)
    back = import_model(tmp_path / "out", tmp_path / "back")
    assert back.model == decoder.model
    first = read(StoredWeights(run / "checkpoints" / "step_00000001"), decoder.shapes())
    assert_bits(first, read(StoredWeights(tmp_path / "back"), decoder.shapes()))


def test_an_export_may_round(tmp_path: Path) -> None:
    decoder = Decoder(model=OURS["Qwen3ForCausalLM"])
    model = ours.random_model(decoder)
    export_model(ours.save_run(model, decoder, tmp_path / "run"), tmp_path / "out", dtype=torch.bfloat16)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.head.weight.to(torch.bfloat16))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def read(stored: StoredWeights, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    with ours.connected(ours.Ranks(), ours.CPU):
        return stored.read(shapes)
