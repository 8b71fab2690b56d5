"""Import, then export: the files of the model come back, every tensor bit by bit; after a training, what it changed."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.errors import DataError
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks
from farspan.trainer.config import AttentionConfig
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from farspan.trainer.weights.io import Decoder, find_trained_model
from farspan.trainer.weights.source_files import FOLDER, files_beside
from tests.support import hugging_face_models as ours
from tests.support import tiny
from tests.trainer.hugging_face.test_round_trip import THEIRS, random_model

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BESIDE = {
    "generation_config.json": b'{"eos_token_id": [6, 7, 8],\n "temperature": 0.6}',
    "tokenizer.json": b'{"model": {"vocab": {"\xc3\xa9": 0}}}',
    "tokenizer_config.json": b"{}\n",
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": b"{{ messages }}",
    "tekken.json": b"{}",
    "tokenization_other.py": b"pass",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
FIELDS = {
    "bos_token_id": 5,
    "eos_token_id": [6, 7, 8],
    "auto_map": {"AutoConfig": "x.Y"},
    "transformers_version": "4.1",
}
OLD_LLAMA3 = {
    "rope_parameters": None,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
}  # fmt: skip
OLD_YARN = {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}
IDLE = {"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e4, "type": "yarn"}}


def save(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """Write a Hugging Face folder; a None removes a field."""
    folder.mkdir()
    (folder / "additional_chat_templates").mkdir()
    for name, content in BESIDE.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value != REMOVED}))
    names, file_of = list(tensors), {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return folder


REMOVED = "removed"


def source_of(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, fused: bool = False) -> Any:
    """Return fields and tensors of one of `THEIRS`, as transformers saves it."""
    random_model(name).to(dtype).save_pretrained(folder, save_original_format=not fused)
    fields = json.loads((folder / "config.json").read_text())
    tensors = safetensors.load_file(folder / "model.safetensors")
    return fields, tensors


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in safetensors.load_file(file).items()
    }


def assert_same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert {name: tensor.dtype for name, tensor in first.items()} == {n: tensor.dtype for n, tensor in second.items()}
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_unchanged(theirs: Path, tmp_path: Path) -> None:
    import_model(theirs, tmp_path / "weights")
    export_model(tmp_path / "weights", tmp_path / "out", file_bytes=30_000)
    assert_same_tensors(tensors_in(theirs), tensors_in(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (theirs / "config.json").read_text()
    )
    assert {name: (tmp_path / "out" / name).read_bytes() for name in BESIDE} == BESIDE


@pytest.mark.parametrize("name", THEIRS)
def test_every_architecture_comes_back(name: str, tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    number = list(THEIRS).index(name)
    fields, tensors = source_of(name, tmp_path / "saved", dtype=dtypes[number % 3])
    assert_unchanged(save(tmp_path / "theirs", fields | FIELDS, tensors, shards=1 + number % 2 * 2), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        OLD_LLAMA3,
        OLD_YARN,
        IDLE,
        {"rope_parameters": REMOVED},
        {"architectures": REMOVED, "dtype": REMOVED, "torch_dtype": "float32"},
    ],
)
def test_fields_keep_their_form(changes: dict[str, Any], tmp_path: Path) -> None:
    fields, tensors = source_of("llama, MHA, tied, head_dim absent", tmp_path / "saved")
    absent = dict.fromkeys(("head_dim", "num_key_value_heads", "hidden_act", "use_cache"), REMOVED)
    fields |= {"max_position_embeddings": 131072} | FIELDS | absent | changes
    assert_unchanged(save(tmp_path / "theirs", fields, tensors), tmp_path)


@pytest.mark.parametrize("present", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD), (EMBEDDING, HEAD, "different")])
def test_tied_files_keep_their_tables(present: tuple[str, ...], tmp_path: Path) -> None:
    fields, tensors = source_of("qwen3", tmp_path / "saved")
    table = tensors.pop(EMBEDDING)
    tensors |= {name: table.clone() for name in present[:2]}
    if "different" in present:
        tensors[HEAD] += 1
    theirs = save(tmp_path / "theirs", fields, tensors)
    assert_unchanged(theirs, tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype="auto").eval()
    with torch.no_grad():
        logits = expected(ours.TOKENS[None]).logits[0]
    decoder = import_model(theirs, tmp_path / "again")
    assert decoder.model.tied_embeddings == ("different" not in present)
    assert (ours.logits(decoder, tmp_path / "again") - logits).abs().max() <= 1e-5 * logits.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_fused_experts_and_derived_tensors_come_back(name: str, tmp_path: Path) -> None:
    fields, tensors = source_of(name, tmp_path / "saved", fused=True)
    assert any("gate_up_proj" in tensor for tensor in tensors)
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8) for layer in (0, 1)}
    assert_unchanged(save(tmp_path / "theirs", fields, tensors), tmp_path)


def trained(theirs: Path, data: Path, folder: Path, **changes: Any) -> Path:
    """Import a model, train three steps from it and delete the weights; return the run's folder."""
    decoder = import_model(theirs, folder / "weights")
    config = tiny.config(data, folder / "run", ParallelConfig(), steps=3)
    run = replace(config.run, start_from=folder / "weights")
    model = replace(decoder.model, **changes)
    train_config = replace(config.train, compute_dtype="float32")
    train(replace(config, run=run, model=model, attention=decoder.attention, train=train_config), Ranks(), StopSignal())
    shutil.rmtree(folder / "weights")
    return folder / "run"


def test_a_run_has_the_files_of_its_model_wherever_it_is(
    tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields, tensors = source_of("qwen2", tmp_path / "saved", dtype=torch.bfloat16)
    table = F.pad(tensors[EMBEDDING], (0, 0, 0, 264 - 96))
    tensors |= {EMBEDDING: table, HEAD: table.clone()}
    sizes = {"vocab_size": 264, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    theirs = save(tmp_path / "theirs", fields | FIELDS | sizes, tensors)
    run = trained(theirs, tiny_data, tmp_path).rename(tmp_path / "moved")
    caplog.set_level("INFO")
    export_model(run, tmp_path / "out")
    assert "max_position_embeddings=4096, as in the imported model, trained on sequences of 101" in caplog.text
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # The data ends documents with another token than the model knew.
    assert written == fields | FIELDS | sizes | {"dtype": "float32", "eos_token_id": [6, 7, 8, 256]}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [6, 7, 8, 256], "temperature": 0.6}
    others = BESIDE.keys() - {"generation_config.json"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in others} == {name: BESIDE[name] for name in others}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    # A run that starts from the checkpoint has them, too.
    assert files_beside(run / "checkpoints" / "step_00000003")["tokenizer.model"] == BESIDE["tokenizer.model"]


def test_what_training_changed_is_written(tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A short model whose RoPE follows its number of positions is stretched, and has a tied file with two tables."""
    fields, tensors = source_of("mixtral", tmp_path / "saved")
    table = F.pad(tensors[EMBEDDING], (0, 0, 0, 264 - 96))
    tensors |= {EMBEDDING: table, HEAD: table + 1}
    # The original context is max_position_embeddings, 64.
    rope = {"rope_parameters": REMOVED, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    changes = {"vocab_size": 264, "tie_word_embeddings": True, "max_position_embeddings": 64}
    theirs = save(tmp_path / "theirs", fields | FIELDS | changes | rope, tensors)
    run = trained(theirs, tiny_data, tmp_path, norm_epsilon=1e-3)
    caplog.set_level("INFO")
    export_model(run, tmp_path / "out")
    assert "max_position_embeddings=101, trained on sequences of 101" in caplog.text
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert written["rope_scaling"].items() >= scaling.items()
    assert (written["rms_norm_eps"], written["tie_word_embeddings"]) == (1e-3, False)
    assert (written["auto_map"], written["max_position_embeddings"]) == (FIELDS["auto_map"], 101)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    trained_model = find_trained_model(run)
    with torch.no_grad():
        expected = loaded(ours.TOKENS[None]).logits[0]
    assert (ours.logits(trained_model.decoder, trained_model.weights) - expected).abs().max() <= 1e-5 * expected.std()


def test_a_run_from_scratch_exports_the_tokenizer_of_its_data(tiny_data: Path, tmp_path: Path) -> None:
    data = tiny.with_tokenizer(tiny_data, tmp_path / "data", BESIDE["tokenizer.json"])
    config = tiny.config(data, tmp_path / "run", ParallelConfig(), steps=3)
    train(config, Ranks(), StopSignal())
    shutil.rmtree(data)
    export_model(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == BESIDE["tokenizer.json"]
    # As in runs of older versions.
    shutil.rmtree(tmp_path / "run" / FOLDER)
    tiny.with_tokenizer(tiny_data, data, BESIDE["tokenizer.json"])
    export_model(tmp_path / "run", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer_config.json").read_bytes() == b"{}"
    tiny.with_tokenizer(tiny_data, tmp_path / "other", b"{}")
    shutil.copy(tmp_path / "other" / "tokenizer" / "tokenizer.json", data / "tokenizer")
    with pytest.raises(DataError, match=r"tokenizer\.json was changed since the data was prepared"):
        export_model(tmp_path / "run", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_mechanisms_of_one_mask_are_exported(tmp_path: Path) -> None:
    """A window of the same tokens in transformers: the logits of position 300 depend on 37 of them."""
    models = {"MistralForCausalLM": ours.MODEL, "Qwen3ForCausalLM": replace(ours.MODEL, qk_norm=True)}
    patterns = {"MistralForCausalLM": "window", "Qwen3ForCausalLM": "window, dense"}
    for name, model in models.items():
        options: dict[str, Any] = {"window": 37} if patterns[name] == "window" else {"window": {"window": 37}}
        decoder = Decoder(model=model, attention=AttentionConfig(mechanism=patterns[name], options=options))
        run = ours.save_run(ours.random_model(decoder), decoder, tmp_path / name)
        export_model(run, tmp_path / f"{name}_out")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}_out", dtype="auto").eval()
        assert type(loaded).__name__ == name
        with torch.no_grad():
            expected = loaded(ours.TOKENS[None]).logits[0]
        actual = ours.logits(decoder, run / "checkpoints" / "step_00000001")
        assert (actual - expected).abs().max() <= 1e-5
        dense = ours.logits(Decoder(model=model), run / "checkpoints" / "step_00000001")
        assert (actual - dense).abs().max() > 1e-2
        export_model(run, tmp_path / f"{name}_dense", as_dense=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}_dense", dtype="auto").eval()
        with torch.no_grad():
            assert (loaded(ours.TOKENS[None]).logits[0] - dense).abs().max() <= 1e-5
