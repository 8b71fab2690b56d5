"""A run goes out to Hugging Face and comes back by the command line, and another run begins with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from farspan.launch import cli
from farspan.trainer import metrics as module
from farspan.trainer.config import AttentionConfig
from farspan.trainer.toml_config import load_config
from farspan.trainer.weights.io import Decoder
from tests.support import hugging_face_models, tiny

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")

REST = """
[run]
folder = "{folder}/second"
start_from = "{folder}/weights"

[data]
folder = "{data}"
sequence_tokens = 101

[train]
steps = 1
compute_dtype = "float32"
device = "cpu"
"""


def test_out_and_in_and_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.make_data(tmp_path)
    decoder = Decoder(model=replace(hugging_face_models.MODEL, vocabulary_size=264, tied_embeddings=True, qk_norm=True))
    model = hugging_face_models.random_model(decoder)
    run = hugging_face_models.save_run(model, decoder, tmp_path / "run")
    out, weights = tmp_path / "out", tmp_path / "weights"

    def output_of(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    text = output_of("export", run, "--out", out, "--dtype", "bfloat16")
    assert "max_position_embeddings=512, trained on sequences of 512\n" in text
    assert "eos_token_id=null, as data.folder=" in text
    assert "tokenizer   none is known" in text
    assert text.endswith(f"exported    {out}, a Qwen3ForCausalLM\n")
    (out / "tokenizer.json").write_text("{}")
    written = safetensors.load_file(out / "model.safetensors")
    assert "lm_head.weight" not in written
    assert torch.equal(written["model.norm.weight"], model.norm.weight.to(torch.bfloat16))
    text = output_of("import", out, "--out", weights)
    described = (weights / "model.toml").read_text()
    assert text.startswith(f"imported    {weights}: ")
    assert "these settings, also in" in text
    assert f"run.start_from={weights}\n" in text
    assert text.endswith(described + "\n")
    imported = load_config(Decoder, weights / "model.toml").model
    assert imported == hugging_face_models.replaced_positions(decoder.model, 512)
    text = output_of("pool-heads", weights, "--kv-heads", 1, "--out", tmp_path / "mqa")
    assert f"model.kv_heads=1; see {tmp_path}/mqa/model.toml" in text
    # Its files go along.
    assert "tokenizer   tokenizer.json\n" in output_of("export", tmp_path / "mqa", "--out", tmp_path / "mqa_out")
    fields = json.loads((tmp_path / "mqa_out" / "config.json").read_text())
    assert (fields["num_key_value_heads"], fields["num_attention_heads"]) == (1, 4)

    # The printed sections, pasted into a configuration.
    (tmp_path / "second.toml").write_text(described + REST.format(folder=tmp_path, data=data))
    monkeypatch.setattr(module, "peak_flops", lambda device, dtype: 1e10)
    output_of("train", tmp_path / "second.toml", "optimizer.learning_rate=1e-9", "optimizer.warmup_steps=0")
    text = output_of("export", tmp_path / "second", "--out", tmp_path / "on")
    assert "512, as in the imported model, trained on sequences of 101\nend         eos_token_id=256\n" in text
    assert "tokenizer   tokenizer.json\n" in text
    assert (tmp_path / "on" / "tokenizer.json").read_text() == "{}"
    fields = json.loads((tmp_path / "on" / "config.json").read_text())
    assert (fields["eos_token_id"], fields["max_position_embeddings"], fields["torch_dtype"]) == (256, 512, "float32")
    trained = safetensors.load_file(tmp_path / "on" / "model.safetensors")
    expected = {name: tensor.float() for name, tensor in written.items()}
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-7)


def test_dense_attention_for_weights_of_another_mechanism(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = Decoder(model=hugging_face_models.MODEL, attention=AttentionConfig(mechanism="moba"))
    run = hugging_face_models.save_run(hugging_face_models.random_model(decoder), decoder, tmp_path / "run")
    export = ["export", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(export) == 0
    assert "attention   moba by farspan.integrations.transformers, without which" in capsys.readouterr().out
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["farspan"], fields["attn_implementation"]) == ({"mechanism": "moba", "options": {}}, "farspan")
    assert cli.main([*export[:-1], str(tmp_path / "dense"), "--as", "dense", "--dtype", "float16"]) == 0
    assert "farspan" not in (tmp_path / "dense" / "config.json").read_text()
    written = safetensors.load_file(tmp_path / "dense" / "model.safetensors")
    assert written["model.norm.weight"].dtype == torch.float16
