"""From dense runs to models with experts: copies compute what the dense model does, and runs begin with them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.errors import CheckpointError, ConfigError
from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer import train as module
from farspan.trainer.build import build_batches, build_model
from farspan.trainer.checkpoint.verify import newest_complete
from farspan.trainer.config import Config
from farspan.trainer.data.packing import PackedSequences
from farspan.trainer.model.config import ExpertsConfig, HeadMixtureConfig
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import open_data
from farspan.trainer.toml_config import to_toml
from farspan.trainer.train import train
from farspan.trainer.weights.io import load_weights
from farspan.trainer.weights.upcycle import mixed_of, upcycle
from tests.support import tiny
from tests.support.rank_pool import RankPool

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
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    """Two trained runs, whose blocks are parallel, as BAM's are."""
    folder, runs = tmp_path_factory.mktemp("upcycle"), []
    data = tiny.make_data(folder)
    for seed in (11, 12):
        config = tiny.config(data, folder / f"run{seed}", ParallelConfig(), steps=4)
        config = tiny.with_model(replace(config, run=replace(config.run, seed=seed)), parallel_blocks=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "peak_flops", lambda device, dtype: 1e10)
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
def test_copies_of_one_model_compute_what_it_does(dense: list[Config], tmp_path: Path, mixture: str) -> None:
    """Their weights add up to 1."""
    config, run = tiny.with_model(dense[0], **MIXTURES[mixture]), Path(dense[0].run.folder)
    upcycle(config, [run], tmp_path / "weights")
    wanted = losses(dense[0], newest_complete(run / "checkpoints"))
    assert wanted.std() > 0.1
    assert torch.allclose(losses(config, tmp_path / "weights"), wanted, rtol=0, atol=1e-12)


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
    kept = {name: tensor for name, tensor in dense[0].items() if "feed_forward" not in name}
    mixed = mixed_of(dense, {**kept, **new})
    by_name = {name.removeprefix("blocks.0."): tensor for name, tensor in mixed.items()}
    assert by_name["feed_forward.experts.up.weight"].unique(dim=0).tolist() == [[[1.0] * 4] * 3, [[3.0] * 4] * 3]
    assert by_name["feed_forward.experts.up.weight"][:, 0, 0].tolist() == [1, 3, 1, 3]
    assert by_name["attention.query.weight"][:, 0].tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    assert by_name["attention.out.weight"][0].tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    for averaged in ("attention.key.weight", "feed_forward.shared.up.weight", "embedding.weight"):
        assert by_name[averaged].unique().tolist() == [2.0]
    assert by_name["attention.head_router.weight"].unique().tolist() == [7.0]


def test_a_run_begins_with_them_and_resumes_without(dense: list[Config], tmp_path: Path) -> None:
    runs, weights = [Path(config.run.folder) for config in dense], tmp_path / "weights"
    config = tiny.with_model(dense[0], **MIXTURES["with keys of their own"])
    upcycle(config, runs, weights)
    begun = replace(config, run=replace(config.run, folder=tmp_path / "run", start_from=weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "peak_flops", lambda device, dtype: 1e10)
        train(begun, Ranks(), StopSignal())
        first = _losses(tmp_path / "run")
        train(replace(config, run=replace(config.run, folder=tmp_path / "random")), Ranks(), StopSignal())
        assert first[0] < _losses(tmp_path / "random")[0] - 0.1
        # What a run began with need not be kept, and must not be taken again.
        shutil.rmtree(weights)
        longer = replace(begun, train=replace(begun.train, steps=5))
        train(longer, Ranks(), StopSignal())
    assert _losses(tmp_path / "run")[:4] == first
    assert len(_losses(tmp_path / "run")) == 5


def _losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_models_that_do_not_fit_are_refused(dense: list[Config], tmp_path: Path) -> None:
    run, out = Path(dense[0].run.folder), tmp_path / "weights"

    def refused(**changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            upcycle(tiny.with_model(dense[0], **changes), [run], out)
        assert not out.exists()
        return str(error.value)

    assert "has model.layers=2, not 3: experts are copies" in refused(layers=3, experts=EXPERTS)
    assert "must be the model.feed_forward=48 of" in refused(experts=replace(EXPERTS, feed_forward=40))
    assert "model.experts.shared=24 must be 0 or the" in refused(experts=replace(EXPERTS, shared=24))
    assert "leaves nothing to choose" in refused()
    assert "per_token=5 must be" in refused(experts=replace(EXPERTS, per_token=5))
    out.mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        upcycle(tiny.with_model(dense[0], experts=EXPERTS), [run], out)


def test_weights_that_are_none_or_of_another_model_are_refused(dense: list[Config], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        losses(dense[0], tmp_path)
    whole = newest_complete(Path(dense[0].run.folder) / "checkpoints")
    with pytest.raises(CheckpointError, match=r"does not fill this model .*: change model\.\*"):
        losses(tiny.with_model(dense[0], width=16), whole)
    for smaller in ({"layers": 1}, {"qk_norm": False}):
        with pytest.raises(
            CheckpointError, match=r"holds weights that this model does not have \(blocks\..*, \.\.\.\)"
        ):
            losses(tiny.with_model(dense[0], **smaller), whole)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        newest_complete(tmp_path)


@pytest.mark.parametrize(
    ("mine", "theirs", "recurrent_layer"),
    [
        ("dense, lightning", "lightning, dense", "gated"),
        ("mosa", "nats", "plain"),
    ],
)
def test_layers_of_another_kind_are_refused(
    tmp_path: Path, mine: str, theirs: str, recurrent_layer: Literal["gated", "plain"]
) -> None:
    """Their matrices have the same names."""
    config = tiny.config(tmp_path / "data", tmp_path / "run", ParallelConfig())
    config = tiny.with_model(config, recurrent_layer=recurrent_layer)
    of_run = replace(config, attention=replace(config.attention, mechanism=theirs))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(of_run))
    mixture = tiny.with_model(replace(config, attention=replace(config.attention, mechanism=mine)), experts=EXPERTS)
    with pytest.raises(ConfigError, match=f"has attention.mechanism='{theirs}', whose layers have other matrices"):
        upcycle(mixture, [tmp_path / "run"], tmp_path / "weights")


def loaded(config: Config, whole: Path) -> str:
    """On each rank: what it says of weights that the second cannot see."""
    mesh = Mesh.build(config.parallel, "cpu")
    model = build_model(config, mesh, torch.device("cpu"))
    try:
        load_weights(model, whole if dist.get_rank() == 0 else whole / "elsewhere")
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_all_ranks_say_that_one_finds_no_weights(dense: list[Config], ranks: Callable[[int], RankPool]) -> None:
    whole = newest_complete(Path(dense[0].run.folder) / "checkpoints")
    said = ranks(2).run(loaded, dense[0], whole)
    assert said[0] == said[1]
    assert said[0].startswith(f"rank 1: {whole / 'elsewhere'} holds no weights")
