"""Loaded models against the decoder's formulas in float64, against the evaluation of a run, and on two ranks."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import farspan
from farspan.errors import CheckpointError, ConfigError, FarspanError
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.mesh import ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.config import AttentionConfig
from farspan.trainer.hugging_face.convert import export_model
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig, RopeConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import open_all_data
from farspan.trainer.train import train
from farspan.trainer.weights.io import Decoder, save_weights
from tests.support import decoder as formulas
from tests.support import hugging_face_models as ours
from tests.support import runs, tiny
from tests.support.mixture import Seen
from tests.support.rank_pool import Pools

DOCUMENTS = [61, 1, 39]
"""An odd number of tokens, which two ranks have to pad."""
TOKENS = ours.TOKENS[: sum(DOCUMENTS)]
WIDE = replace(ours.MODEL, heads=8, head_dim=8)
"""Eight heads, which the mechanisms' examples are for."""
EXPERTS = ExpertsConfig(count=6, per_token=2, feed_forward=12, shared=8, capacity=1.1, layers="experts, dense")
MODELS = {
    "biases, tied": Decoder(model=replace(ours.MODEL, qkv_bias=True, tied_embeddings=True)),
    "experts, key convolution": Decoder(model=replace(ours.MODEL, experts=EXPERTS, key_convolution=3, qk_norm=True)),
    "heads that tokens choose": Decoder(
        model=replace(WIDE, head_mixture=HeadMixtureConfig(kind="heads", shared=1, per_token=2))
    ),
    "gated recurrences": Decoder(
        model=replace(WIDE, layers=3, recurrent_layer="gated", rope=RopeConfig(rotated=4)),
        attention=AttentionConfig(mechanism="lightning*2, dense"),
    ),
}


def written(decoder: Decoder, folder: Path) -> Transformer:
    """Random weights, saved; router biases that matter too."""
    model = ours.random_model(decoder)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    with connected(Ranks(), ours.CPU):
        save_weights(model.state_dict(), folder, decoder)
    return model


def of_formulas(model: Transformer) -> Callable[[Tensor, list[int]], Tensor]:
    """Return the logits of tokens in documents, float64."""
    parameters = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def logits(tokens: Tensor, documents: list[int]) -> Tensor:
        rows = Rows.packed(documents)
        return formulas.logits(parameters, model.config, tokens, rows.position, rows.document, Seen())

    return logits


def assert_equal(got: Tensor, expected: Tensor) -> None:
    """1e-10: sums of some hundred float64 terms in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_text_are_those_of_the_formulas(name: str, tmp_path: Path) -> None:
    logits = of_formulas(written(MODELS[name], tmp_path / "weights"))
    model = farspan.load(tmp_path / "weights", dtype=torch.float64, device="cpu")
    expected = logits(TOKENS, DOCUMENTS)
    assert_equal(model.logits(TOKENS, DOCUMENTS), expected)
    chunks = list(model.logits_in_chunks(TOKENS.tolist(), DOCUMENTS, chunk=30))
    assert [len(chunk) for chunk in chunks] == [30, 30, 30, 11]
    assert_equal(torch.cat(chunks), expected)
    predicted = [place for place in range(len(TOKENS)) if place not in (60, 61, 100)]
    losses = [-expected[place].log_softmax(0)[TOKENS[place + 1]].item() for place in predicted]
    assert model.loss(TOKENS, DOCUMENTS) == pytest.approx(sum(losses) / 98, rel=1e-10)

    sequence = greedy = drawn = TOKENS[:9]
    for _ in range(4):
        greedy = torch.cat((greedy, logits(greedy, [len(greedy)])[-1:].argmax(dim=-1)))
    assert model.generate(sequence, 4).tolist() == greedy[9:].tolist()
    stop = int(greedy[10])
    up_to_stop = greedy[9 : 9 + greedy[9:].tolist().index(stop) + 1]
    assert model.generate(sequence, 4, stop=[95, stop]).tolist() == up_to_stop.tolist()
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        weights = (logits(drawn, [len(drawn)])[-1] / 1.5).softmax(dim=0)
        drawn = torch.cat((drawn, weights.multinomial(1, generator=generator)))
    assert model.generate(sequence, 4, temperature=1.5, seed=3).tolist() == drawn[9:].tolist()


def test_a_hugging_face_model_is_read_as_it_lies(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'farspan[hf]'")
    decoder = Decoder(model=replace(ours.MODEL, rope=RopeConfig(original_positions=512)))
    source = ours.random_model(decoder)
    export_model(ours.save_run(source, decoder, tmp_path / "run"), tmp_path / "theirs")
    before = sorted(tmp_path.rglob("*"))
    model = farspan.load(str(tmp_path / "theirs"), dtype=torch.float64, device="cpu")
    assert_equal(model.logits(TOKENS), of_formulas(source)(TOKENS, [len(TOKENS)]))
    assert sorted(tmp_path.rglob("*")) == before
    assert farspan.load(tmp_path / "theirs", device="cpu").dtype == torch.float32, "as stored"
    assert farspan.load(tmp_path / "run", device="cpu").dtype == torch.float32, "as trained"


def test_the_loss_of_a_run_is_that_of_its_evaluation(tiny_data: Path, tmp_path: Path) -> None:
    """The held-out documents are one sequence, so that all labels are known and none lies past its end."""
    config = tiny.config(tiny_data, tmp_path / "run", ParallelConfig(), steps=3)
    config = tiny.with_model(config, experts=tiny.EXPERTS, key_convolution=3)
    moba = AttentionConfig(mechanism="moba", options={"block": 16, "top_k": 2}, backend="cpu")
    config = replace(config, attention=moba, data=replace(config.data, sequence_tokens=1500))
    train(config, Ranks(), StopSignal())
    (recorded,) = (record["eval_loss"] for record in runs.records(tmp_path / "run") if "eval_loss" in record)
    sequence = open_all_data(config)[1]["eval"].sequence(0)
    real = sequence.document >= 0
    assert 500 < real.sum() < len(real)
    tokens, lengths = torch.from_numpy(sequence.tokens[real]), torch.from_numpy(sequence.document[real]).bincount()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000003"):
        model = farspan.load(folder, device="cpu")
        assert model.dtype == torch.float64
        assert model.loss(tokens, lengths.tolist()) == pytest.approx(recorded, rel=1e-12)
    rounded = farspan.load(tmp_path / "run", device="cpu", dtype=torch.bfloat16)
    assert rounded.loss(tokens, lengths.tolist()) == pytest.approx(recorded, rel=1e-2)
    assert rounded.logits(tokens[:5]).dtype == torch.float32
    assert {x.dtype for x in rounded.model.buffers()} == {torch.float32}, "biases of routers are not rounded"


def example(name: str) -> Decoder:
    """A model with the first example of a mechanism."""
    options = asdict(MECHANISMS.get(name).examples()[0])  # pyright: ignore[reportArgumentType]
    tree = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    return Decoder(model=WIDE, attention=AttentionConfig(mechanism=name, options=tree))


Results = tuple[Tensor, float, list[int]]


def results(folder: Path, **options: object) -> Results:
    model = farspan.load(folder, device="cpu", dtype=torch.float64, **options)  # pyright: ignore[reportArgumentType]
    return model.logits(TOKENS, DOCUMENTS), model.loss(TOKENS, DOCUMENTS), model.generate(TOKENS[:13], 2).tolist()


def on_ranks(cases: list[tuple[Path, str, str]]) -> list[Results]:
    return [results(folder, group=dist.group.WORLD, strategy=by, layout=layout) for folder, by, layout in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of each mechanism and of `MODELS`."""
    made = {name: example(name) for name in MECHANISMS} | MODELS
    parent = tmp_path_factory.mktemp("models")
    for number, decoder in enumerate(made.values()):
        written(decoder, parent / str(number))
    return {name: parent / str(number) for number, name in enumerate(made)}


def test_two_ranks_find_what_one_process_does(ranks: Pools, folders: dict[str, Path]) -> None:
    """Each mechanism and model under the strategy of the cost model and under one more, in turns."""
    turns = ("auto", "zigzag"), ("fetch", "striped"), ("ulysses", "balanced"), ("auto", "contiguous")
    cases = [(folder, *turns[number % 4]) for number, folder in enumerate(folders.values())]
    found = ranks(2).run(on_ranks, cases)
    for number, (folder, *how) in enumerate(cases):
        logits, loss, text = results(folder)
        for of_rank in found:
            # 1e-9: float64, after layers in which a last bit may grow some hundred times.
            assert (of_rank[number][0] - logits).abs().max() <= 1e-9, how
            assert of_rank[number][1:] == (pytest.approx(loss, rel=1e-9), text)


def alone_together_and_refused(folder: Path) -> tuple[int, list[int], list[str]]:
    """One rank loads and computes by itself; all draw a text; then all meet a strategy that serves no mask, one that is
    none, and a folder of nothing."""
    tokens = len(farspan.load(folder, device="cpu").logits([1, 2, 3])) if dist.get_rank() == 1 else 3
    drawn = farspan.load(folder, device="cpu", group=dist.group.WORLD).generate([1], 9, temperature=2.0)
    sentences = []
    # Only one of the ranks does not find it.
    missing = folder if dist.get_rank() == 1 else folder / "nothing"
    for path, strategy in ((folder, "ship"), (folder, "rings"), (missing, "auto")):
        with pytest.raises(FarspanError) as raised:
            farspan.load(path, device="cpu", group=dist.group.WORLD, strategy=strategy)
        sentences.append(str(raised.value))
    dist.barrier()
    return tokens, drawn.tolist(), sentences


def test_a_rank_loads_alone_and_ranks_draw_and_fail_together(ranks: Pools, folders: dict[str, Path]) -> None:
    (_, text, first), (alone, same_text, second) = ranks(2).run(alone_together_and_refused, folders["dense"])
    assert alone == 3
    assert text == same_text
    assert first == second
    assert "'ship'" in first[0]
    assert "Did you mean 'ring'" in first[1]
    assert "is not a trained model" in first[2]


def test_what_cannot_be_loaded_or_computed_is_refused(tmp_path: Path) -> None:
    experts = ExpertsConfig(count=4, per_token=2, feed_forward=8, choice="experts")
    written(Decoder(model=replace(ours.MODEL, experts=experts)), tmp_path / "weights")
    model = farspan.load(tmp_path / "weights", device="cpu")
    with pytest.raises(ConfigError, match="choice='experts' chooses among all tokens"):
        model.generate([1], 1)
    for tokens, documents, message in (
        ([], None, "at least one"),
        ([[1, 2]], None, "of one sequence"),
        ([1, 96], None, "token 96 is outside the model's vocabulary, 0 to 95"),
        ([1, -1], None, "token -1"),
        ([True, False], None, "got torch.bool"),
        ([1, 2], [1], r"add up to the 2 tokens; got \[1\]"),
        ([1, 2], [2, 0], "add up to"),
        ([1, 2], [1, 1], "two tokens or more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.loss(tokens, documents)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="nowhere is not a trained model"):
        farspan.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"folder='\$NOT_SET_HERE/x' has \$NOT_SET_HERE"):
        farspan.load("$NOT_SET_HERE/x")
    shard = next((tmp_path / "weights").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} holds other bytes than were written"):
        farspan.load(tmp_path / "weights")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="gpt2"):
        farspan.load(tmp_path / "theirs")
