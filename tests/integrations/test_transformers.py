"""The plug-in of transformers against transformers' own attention, and ranks against one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.parallel.context_parallel import api
from farspan.trainer.config import AttentionConfig
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.weights.io import Decoder
from tests.support import hugging_face_models as ours
from tests.support.rank_pool import Pools

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.support import hugging_face_training as training  # noqa: E402

# transformers, accelerate and what they import warn of deprecations of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(1, 96, (2, LENGTH := 50), generator=torch.Generator().manual_seed(1))
MOBA = {"mechanism": "moba", "options": {"block": 8, "top_k": 2}}
WINDOW = {"mechanism": "window", "options": {"window": 11}}
MIXED = {"mechanism": "window, moba", "options": {"window": WINDOW["options"], "moba": MOBA["options"]}}
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 9},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@torch.no_grad()
def logits(model: Any, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model.eval()(**{"input_ids": IDS, **inputs}).logits


@pytest.mark.parametrize("kind", MODELS)
def test_stock_models_have_their_logits(kind: str) -> None:
    training.plug_in.register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="farspan").double()
    if kind in ("Mixtral", "Qwen3Moe"):
        model.set_experts_implementation("eager")  # the default has no float64
    expected = logits(model, "sdpa")
    assert expected.std() > 0.1
    assert (logits(model, "farspan") - expected).abs().max() <= 1e-12
    # Their softmax is always float32.
    assert (logits(model, "eager") - expected).abs().max() <= 2e-6
    model.float()
    assert (logits(model, "farspan") - logits(model, "sdpa")).abs().max() <= 1e-6


def test_gradients_and_another_scale_are_theirs() -> None:
    model, found = training.tiny_llama(None), {}
    model.model.layers[1].self_attn.scaling = 0.4
    for implementation in ("sdpa", "farspan"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found[implementation] = [parameter.grad for parameter in model.parameters()]
    for ours_, theirs in zip(found["farspan"], found["sdpa"], strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-10, atol=1e-12)


def test_mixed_precision_is_theirs() -> None:
    """Under autocast queries and keys come in float32, as rotation leaves them, and values in bfloat16."""
    model = training.tiny_llama(None).float()
    with torch.autocast("cpu", torch.bfloat16):
        difference = logits(model, "farspan") - logits(model, "sdpa")
    # Both round scores' inputs and results to 8 bits, but not all sums between alike.
    assert difference.abs().max() <= 2**-6


def test_padding_is_theirs_before_and_after_tokens() -> None:
    model, mask = training.tiny_llama(None), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :13], mask[1, 40:] = 0, 0
    difference = logits(model, "farspan", attention_mask=mask) - logits(model, "sdpa", attention_mask=mask)
    assert difference[mask.bool()].abs().max() <= 1e-12


@pytest.mark.parametrize("entry", [None, MOBA, MIXED], ids=["dense", "moba", "mixed"])
def test_packed_documents_are_as_if_alone(entry: dict[str, Any] | None) -> None:
    model, lengths = training.tiny_llama(entry), (17, 5, 28)
    features = [{"input_ids": part.tolist()} for part in IDS[0].split(lengths)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate(features, return_tensors="pt")
    batch.pop("labels")
    alone = torch.cat([logits(model, "farspan", input_ids=part[None])[0] for part in IDS[0].split(lengths)])
    assert (logits(model, "farspan", **batch)[0] - alone).abs().max() <= 1e-12
    positions = {"position_ids": batch["position_ids"]}
    packed = logits(model, "farspan", input_ids=IDS[:1], **positions)
    assert (packed[0] - alone).abs().max() <= 1e-12
    if entry is None:
        # They look for documents where there is no cache.
        theirs = logits(model, "sdpa", input_ids=IDS[:1], use_cache=False, **positions)
        assert (packed - theirs).abs().max() <= 1e-12
    # The same tensor with other positions.
    batch["position_ids"].copy_(torch.arange(LENGTH))
    whole = logits(model, "farspan", input_ids=IDS[:1])
    assert (logits(model, "farspan", input_ids=IDS[:1], **positions) - whole).abs().max() <= 1e-12


def generated(model: Any, ids: Tensor, use_cache: bool, **inputs: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache, **inputs)


@pytest.mark.parametrize("entry", [None, WINDOW, MOBA, MIXED], ids=["dense", "window", "moba", "mixed"])
def test_a_cache_generates_the_same_tokens(entry: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = training.tiny_llama(entry)
    for prefix in (7, 8):  # the next token ends a block, or begins one
        assert torch.equal(generated(model, IDS[:, :prefix], True), generated(model, IDS[:, :prefix], False))
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[1, :4] = 0
    padded = generated(model, IDS[:, :17], True, attention_mask=mask)
    assert torch.equal(padded, generated(model, IDS[:, :17], False, attention_mask=mask))
    assert torch.equal(padded[1, 4:], generated(model, IDS[1:, 4:17], True)[0])
    cached = api._context_parallel(None, "auto", "zigzag")._planned_last
    assert 0 < cached.cache_info().currsize <= api.PLANS_OF_LAST_TOKENS

    def off_by_one(mechanism: Any, rows: Any, queries: Tensor, *arguments: Any, **named: Any) -> Any:
        return planned(mechanism, rows, queries - 1, *arguments, **named)

    planned = api.plan_last_queries
    monkeypatch.setattr(api, "plan_last_queries", off_by_one)
    cached.cache_clear()
    wrong = generated(model, IDS[:, :17], True)
    cached.cache_clear()
    assert not torch.equal(wrong, generated(model, IDS[:, :17], False)), "a cache that is off by one is seen"


def test_a_sliding_window_of_mistral_generates_the_same_tokens() -> None:
    config = transformers.MistralConfig(**SIZES, sliding_window=9, eos_token_id=None)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="farspan").double()
    assert torch.equal(generated(model, IDS[:, :17], True), generated(model, IDS[:, :17], False))


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"mechanism": "moba", "options": {"block": 16, "top_k": 2}}),
        ({"qk_norm": True}, {"mechanism": "dense, moba", "options": {"moba": {"block": 16, "top_k": 2}}}),
        ({"kv_heads": 4}, {"mechanism": "lightning"}),
        ({"experts": ours.EXPERTS, "feed_forward": 24}, {"mechanism": "window", "options": {"window": 20, "sinks": 2}}),
    ],
    ids=["moba", "pattern", "lightning", "experts"],
)
def test_an_exported_model_has_our_logits_and_comes_back(
    changes: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.plug_in.register()
    decoder = Decoder(model=replace(ours.MODEL, **changes), attention=AttentionConfig(**options))
    run = ours.save_run(ours.random_model(decoder), decoder, tmp_path / "run")
    export_model(run, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    expected = ours.logits(decoder, run / "checkpoints" / "step_00000001")
    assert (model(ours.TOKENS[None]).logits[0] - expected).abs().max() <= 1e-5
    dense = ours.logits(Decoder(model=decoder.model), run / "checkpoints" / "step_00000001")
    assert (dense - expected).abs().max() > 1e-2, "the mechanism matters"
    # As saved by transformers, too, and by those who asked for another attention.
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert (again(ours.TOKENS[None]).logits[0] - expected).abs().max() <= 1e-5
    for folder in ("out", "again"):
        assert import_model(tmp_path / folder, tmp_path / f"{folder}_in").attention == decoder.attention
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "farspan")
    for folder in ("out", "again"):
        with pytest.raises(ValueError, match='`attn_implementation="farspan"` is not supported'):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"output_attentions": True}, "makes no attention weights"),
    ({}, {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, r"alone, not \[2, 1, 50, 50\]"),
    ({}, {"attention_mask": (torch.arange(LENGTH) % 20 > 3).long().repeat(2, 1)}, "hides tokens between others"),
    ({}, {"cu_seq_lens_q": torch.tensor([0, 20])}, "do not make up 2 sequences of 50"),
    ({"attention_dropout": 0.1}, {}, "attention_dropout=0.0 instead of 0.1"),
    ({"is_causal": False}, {}, "set is_causal=True"),
    ({"model_type": "gemma2"}, {}, "computes models of type llama, mistral, .* not gemma2"),
    ({"farspan": {"mechanism": "mosa"}}, {}, "whose router no model of transformers has"),
    ({"farspan": {"mechanism": "mobba"}}, {}, "Did you mean 'moba'"),
    ({"farspan": {"mechanism": "moba", "options": {"blok": 1}}}, {}, "Did you mean 'block'"),
    ({"farspan": {"backend": "cpu"}}, {}, "may have only the keys mechanism and options"),
]


@pytest.mark.parametrize(("fields", "inputs", "why"), REFUSED)
def test_what_farspan_does_not_compute_is_refused(fields: dict[str, Any], inputs: dict[str, Any], why: str) -> None:
    model = training.tiny_llama(None).train()
    for name, value in fields.items():
        setattr(model.config, name, value)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = model.config.attention_dropout
    with pytest.raises(ConfigError, match=why):
        model(IDS, **inputs)


def test_caches_and_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="no cache of a fixed length"):
        training.tiny_llama(None).generate(IDS, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ConfigError, match="queries of a tile select together"):
        generated(training.tiny_llama({"mechanism": "sparge"}), IDS, True)
    config = transformers.MistralConfig(**SIZES, sliding_window=9)
    config.farspan = MOBA
    with pytest.raises(ConfigError, match=r"config\.sliding_window=9 besides config\.farspan"):
        transformers.MistralForCausalLM._from_config(config, attn_implementation="farspan")(IDS)


@pytest.mark.parametrize("entry", [None, WINDOW, MOBA], ids=["dense", "window", "moba"])
def test_trainer_on_two_ranks_is_trainer_in_one_process(
    entry: dict[str, Any] | None, ranks: Pools, tmp_path: Path
) -> None:
    steps, evaluated = training.train_with_trainer(entry, None, str(tmp_path))
    assert len(steps) == 20
    for found, evaluation in ranks(2).run(training.train_with_trainer, entry, "ring", str(tmp_path)):
        assert found == pytest.approx(steps, rel=0, abs=1e-9)
        assert evaluation == pytest.approx(evaluated, rel=0, abs=1e-6)  # gathered as float32


@pytest.mark.parametrize(
    ("entry", "strategy", "packed"), [(None, "ulysses", True), (WINDOW, "gather", False), (MOBA, "ring", True)]
)
def test_a_loop_on_two_ranks_is_one_process(
    entry: dict[str, Any] | None, strategy: str, packed: bool, ranks: Pools
) -> None:
    losses = training.train(entry, None, packed)
    for found in ranks(2).run(training.train, entry, strategy, packed):
        assert found == pytest.approx(losses, rel=0, abs=1e-9)


def test_accelerate_on_two_ranks_is_one_process(ranks: Pools) -> None:
    losses = training.train_with_accelerate(MOBA, None)
    for found in ranks(2).run(training.train_with_accelerate, MOBA, "ring"):
        assert found == pytest.approx(losses, rel=0, abs=1e-9)


def test_gradients_scaled_by_the_degree_are_seen(ranks: Pools) -> None:
    losses = training.train(None, None)
    for found in ranks(2).run(training.train, None, "ring", False, 2.0):
        assert found[0] == pytest.approx(losses[0], rel=0, abs=1e-9)
        assert abs(found[-1] - losses[-1]) > 1e-3


def test_ranks_refuse_what_would_go_wrong(ranks: Pools) -> None:
    for others, cached, uncached, implementation in ranks(2).run(training.refusals):
        assert "got different input_ids" in others
        assert "generate outside" in cached
        assert "generate outside" in uncached
        assert "attn_implementation='sdpa'" in implementation
