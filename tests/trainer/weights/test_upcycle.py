"""From dense runs to models with experts: copies compute the same as the dense model, and runs start from them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import farspan
from farspan.errors import CheckpointError, ConfigError
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.checkpoint.verify import newest_complete
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import open_data
from farspan.trainer.train import train
from farspan.trainer.weights.io import Decoder, load_weights
from farspan.trainer.weights.source_files import files_beside, write_files
from farspan.trainer.weights.upcycle import upcycle, upcycled
from tests.support import tiny
from tests.support.hugging_face_models import save_run
from tests.support.rank_pool import Pools, error_of
from tests.support.runs import records

EXPERTS = ExpertsConfig(count=4, per_token=2, feed_forward=48)
ALL_EXPERTS = HeadMixtureConfig(kind="experts", count=3, per_token=3)
MIXTURES: dict[str, dict[str, Any]] = {
    "experts": {"experts": EXPERTS},
    "experts of attention, all of them": {"head_mixture": ALL_EXPERTS},
    "with keys of their own": {"head_mixture": replace(ALL_EXPERTS, own_keys=True), "experts": EXPERTS},
    "some experts of attention": {"head_mixture": replace(ALL_EXPERTS, per_token=2)},
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dense(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Two trained runs with parallel blocks, as in BAM."""
    folder, runs = tmp_path_factory.mktemp("upcycle"), []
    for seed in (11, 12):
        config = tiny.config(tiny_data, folder / f"run{seed}", ParallelConfig(), steps=4)
        config = tiny.with_model(replace(config, run=replace(config.run, seed=seed)), parallel_blocks=True)
        train(config, Ranks(), StopSignal())
        runs.append(config)
    return runs


def losses(config: Config, weights: Path) -> Tensor:
    """The losses of a sequence by a model with these weights."""
    sequence = PackedSequences(open_data(config)[0], sequence_tokens=tiny.SEQUENCE_TOKENS, seed=0).sequence(0)
    cpu = torch.device("cpu")
    with connected(Ranks(), cpu):
        mesh = Mesh.build(config.parallel, "cpu")
        model = build_model(config, mesh, cpu)
        load_weights(model, weights)
        batch = build_batches(config, mesh, cpu, Traffic()).build(sequence)
        with torch.no_grad():
            return model(batch.tokens, batch.labels, batch.context).losses


@pytest.mark.parametrize("mixture", MIXTURES)
def test_copies_of_one_model_compute_the_same(dense: list[Config], tmp_path: Path, mixture: str) -> None:
    """The weights of experts add up to 1."""
    config, run = tiny.with_model(dense[0], **MIXTURES[mixture]), Path(dense[0].run.folder)
    upcycle(config, [run], tmp_path / "weights")
    expected = losses(dense[0], newest_complete(run / "checkpoints"))
    assert expected.std() > 0.1
    assert torch.allclose(losses(config, tmp_path / "weights"), expected, rtol=0, atol=1e-12)
    # They say themselves which model they are.
    loaded, original = (farspan.load(folder, device="cpu").logits(range(50)) for folder in (tmp_path / "weights", run))
    assert torch.allclose(loaded, original, rtol=0, atol=1e-12)


def test_each_model_gives_every_second_expert_and_half_of_the_rest() -> None:
    shapes = {
        "embedding.weight": (5, 4),
        "blocks.0.attention.query.weight": (4, 4),
        "blocks.0.attention.key.weight": (2, 4),
        "blocks.0.attention.out.weight": (4, 4),
        "blocks.0.feed_forward.up.weight": (3, 4),
    }
    dense = [{name: torch.full(shape, value) for name, shape in shapes.items()} for value in (1.0, 3.0)]
    new = {
        "blocks.0.attention.query.weight": torch.empty(8, 4),
        "blocks.0.attention.out.weight": torch.empty(4, 8),
        "blocks.0.attention.head_router.weight": torch.full((2, 4), 7.0),
        "blocks.0.feed_forward.experts.up.weight": torch.empty(4, 3, 4),
        "blocks.0.feed_forward.shared.up.weight": torch.empty(3, 4),
    }
    unchanged = {name: tensor for name, tensor in dense[0].items() if "feed_forward" not in name}
    weights = upcycled(dense, {**unchanged, **new})
    by_name = {name.removeprefix("blocks.0."): tensor for name, tensor in weights.items()}
    assert by_name["feed_forward.experts.up.weight"].unique(dim=0).tolist() == [[[1.0] * 4] * 3, [[3.0] * 4] * 3]
    assert by_name["feed_forward.experts.up.weight"][:, 0, 0].tolist() == [1, 3, 1, 3]
    assert by_name["attention.query.weight"][:, 0].tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    assert by_name["attention.out.weight"][0].tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    for averaged in ("attention.key.weight", "feed_forward.shared.up.weight", "embedding.weight"):
        assert by_name[averaged].unique().tolist() == [2.0]
    assert by_name["attention.head_router.weight"].unique().tolist() == [7.0]


def test_a_run_starts_from_the_weights_and_resumes_without_them(dense: list[Config], tmp_path: Path) -> None:
    runs, weights = [Path(config.run.folder) for config in dense], tmp_path / "weights"
    config = tiny.with_model(dense[0], **MIXTURES["with keys of their own"])
    upcycle(config, runs, weights)
    started = replace(config, run=replace(config.run, folder=tmp_path / "run", start_from=weights))
    train(started, Ranks(), StopSignal())
    first = losses_of_steps(tmp_path / "run")
    train(replace(config, run=replace(config.run, folder=tmp_path / "random")), Ranks(), StopSignal())
    assert first[0] < losses_of_steps(tmp_path / "random")[0] - 0.1
    # A resumed run neither needs nor reads the weights.
    shutil.rmtree(weights)
    train(replace(started, train=replace(started.train, steps=5)), Ranks(), StopSignal())
    assert losses_of_steps(tmp_path / "run")[:4] == first
    assert len(losses_of_steps(tmp_path / "run")) == 5


def losses_of_steps(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if "loss" in record]


def test_models_that_do_not_fit_are_refused(dense: list[Config], tmp_path: Path) -> None:
    run, out = Path(dense[0].run.folder), tmp_path / "weights"

    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            upcycle(tiny.with_model(dense[0], **changes), [run], out)
        assert not out.exists()
        return str(error.value)

    assert "has model.layers=2, not 3" in refused(layers=3, experts=EXPERTS)
    wide = replace(EXPERTS, feed_forward=40)
    assert "model.experts.feed_forward=40 must be the model.feed_forward=48 of" in refused(experts=wide)
    assert "model.experts.shared=24 must be 0 or the" in refused(experts=replace(EXPERTS, shared=24))
    assert "has no experts: set model.experts or model.head_mixture" in refused()
    assert "per_token=5 must be" in refused(experts=replace(EXPERTS, per_token=5))
    assert "normalized=true with model.experts.per_token=1" in refused(experts=replace(EXPERTS, per_token=1))
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(tiny.with_model(dense[0], experts=EXPERTS), [run], out)


def test_the_tokenizer_goes_along_and_has_to_be_one(dense: list[Config], tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(config.run.folder, tmp_path / config.run.folder.name)) for config in dense]
    config = tiny.with_model(dense[0], experts=EXPERTS)
    first, other = b'{"model": {"vocab": {"a": 0}}}', b'{"model": {"vocab": {"a": 1}}}'
    write_files({"tokenizer.json": first}, runs[0])
    for number, second in enumerate((None, b'{"padding": {}, "model": {"vocab": {"a": 0}}}')):
        write_files({} if second is None else {"tokenizer.json": second}, runs[1])
        upcycle(config, runs, tmp_path / str(number))
        assert files_beside(tmp_path / str(number)) == {"tokenizer.json": first}
    write_files({"tokenizer.json": other}, runs[1])
    with pytest.raises(ConfigError, match=rf"{runs[1]} was trained with another tokenizer\.json than {runs[0]}: "):
        upcycle(config, runs, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_missing_weights_and_those_of_another_model_are_refused(dense: list[Config], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        losses(dense[0], tmp_path)
    weights = newest_complete(Path(dense[0].run.folder) / "checkpoints")
    with pytest.raises(CheckpointError, match="does not fill this model"):
        losses(tiny.with_model(dense[0], width=16), weights)
    for smaller in ({"layers": 1}, {"qk_norm": False}):
        with pytest.raises(CheckpointError, match=r"weights that this model does not have \(blocks\..*, \.\.\.\)"):
            losses(tiny.with_model(dense[0], **smaller), weights)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        newest_complete(tmp_path)


@pytest.mark.parametrize(
    ("new", "old", "recurrent_layer"), [("dense, lightning", "lightning, dense", "gated"), ("mosa", "nats", "plain")]
)
def test_layers_of_another_kind_are_refused(
    tmp_path: Path, new: str, old: str, recurrent_layer: Literal["gated", "plain"]
) -> None:
    """Their matrices have the same names."""
    config = tiny.config(tmp_path / "data", tmp_path / "run", ParallelConfig())
    config = tiny.with_model(config, recurrent_layer=recurrent_layer)
    dense = Decoder(model=config.model, attention=replace(config.attention, mechanism=old))
    save_run(Transformer(dense.model, dense.mechanisms()), dense, tmp_path / "run")
    mixture = tiny.with_model(replace(config, attention=replace(config.attention, mechanism=new)), experts=EXPERTS)
    with pytest.raises(ConfigError, match=f"has attention.mechanism='{old}', whose layers have other matrices"):
        upcycle(mixture, [tmp_path / "run"], tmp_path / "weights")


def load_on_first_rank(config: Config, weights: Path) -> None:
    """On each rank: load weights that rank 1 cannot see."""
    model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    load_weights(model, weights if dist.get_rank() == 0 else weights / "elsewhere")


def test_all_ranks_report_that_one_finds_no_weights(dense: list[Config], ranks: Pools) -> None:
    weights = newest_complete(Path(dense[0].run.folder) / "checkpoints")
    messages = ranks(2).run(error_of, CheckpointError, load_on_first_rank, dense[0], weights)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"rank 1: {weights / 'elsewhere'} holds no weights")
