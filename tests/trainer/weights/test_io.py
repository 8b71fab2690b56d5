"""What is found of a trained model: the configuration of its checkpoint, and every byte that differs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.errors import CheckpointError, FarspanError
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.parallel.ranks import Ranks, connected
from farspan.trainer.build import build_model
from farspan.trainer.config import AttentionConfig, Config
from farspan.trainer.hugging_face.convert import export_model, import_model
from farspan.trainer.model.transformer import Transformer
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.train import train
from farspan.trainer.weights.io import Decoder, find_trained_model, load_weights, other_settings, save_weights
from farspan.trainer.weights.pool_heads import pool_heads
from farspan.trainer.weights.source_files import keep_in_run
from tests.support import hugging_face_models as ours
from tests.support import tiny
from tests.support.rank_pool import Pools, error_of

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore")

MOBA = AttentionConfig(mechanism="moba", options={"block": 16, "top_k": 2}, backend="cpu")
DECODER = Decoder(model=replace(ours.MODEL, layers=1))
TIED = Decoder(model=replace(DECODER.model, tied_embeddings=True))


@pytest.fixture(scope="module")
def resumed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with MoBA for three steps, another base of RoPE for one, and then dense attention."""
    config = tiny.config(tiny_data, tmp_path_factory.mktemp("resumed") / "run", ParallelConfig(), steps=3)
    config = tiny.with_model(config, qk_norm=False, width=32, head_dim=8)
    config = replace(config, checkpoint=replace(config.checkpoint, keep=9))
    changed = ("attention.mechanism", "model.rope.base")

    def go_on(base: Config, steps: int, attention: AttentionConfig) -> Config:
        accepting = replace(base.checkpoint, accept_changed=changed)
        train_config = replace(base.train, steps=steps)
        config = replace(base, attention=attention, checkpoint=accepting, train=train_config)
        train(config, Ranks(), StopSignal())
        return config

    config = go_on(config, 3, MOBA)
    rope = replace(config.model.rope, base=2e4)
    config = go_on(tiny.with_model(config, rope=rope), 4, MOBA)
    go_on(config, 5, AttentionConfig())
    return config.run.folder


def found(folder: Path) -> tuple[str, float]:
    decoder = find_trained_model(folder).decoder
    return decoder.attention.mechanism, decoder.model.rope.base


def test_a_checkpoint_has_the_configuration_that_it_was_trained_with(resumed: Path, tmp_path: Path) -> None:
    steps = [resumed / "checkpoints" / f"step_{step:08d}" for step in (3, 4, 5)]
    assert [found(step) for step in steps] == [("moba", 1e4), ("moba", 2e4), ("dense", 2e4)]
    assert found(resumed) == ("dense", 2e4)
    export_model(steps[0], tmp_path / "moba")
    assert json.loads((tmp_path / "moba" / "config.json").read_text())["farspan"]["mechanism"] == "moba"
    export_model(steps[0], tmp_path / "out", as_dense=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 1e4
    with connected(Ranks(), ours.CPU):
        model = Transformer(find_trained_model(steps[0]).decoder.model, AttentionConfig().build_mechanisms(2))
        load_weights(model.double(), steps[0])
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    key = model.get_parameter("blocks.1.attention.key.weight")
    assert torch.equal(written["model.layers.1.self_attn.k_proj.weight"], key)
    assert pool_heads(steps[0], 1, tmp_path / "pooled").attention.mechanism == "moba"
    # The run went back behind a damaged checkpoint, and kept a configuration as that of other steps.
    moved = shutil.copytree(resumed, tmp_path / "moved")
    (moved / "config_until_step_4.toml").rename(moved / "config_until_step_2.toml")
    assert found(moved / "checkpoints" / "step_00000004") == ("moba", 2e4)
    # It was stopped before its next checkpoint, after config.toml was written.
    shutil.rmtree(moved / "checkpoints" / "step_00000005")
    assert found(moved) == ("moba", 2e4)
    for history in moved.glob("config_until_step_*.toml"):
        history.unlink()
    with pytest.raises(CheckpointError, match=r"another configuration .*config\.toml has attention\.mechanism="):
        find_trained_model(moved)


@pytest.mark.parametrize("mechanism", ["mosa", "nats", "lightning"])
def test_weights_that_dense_attention_lacks_are_not_exported(mechanism: str, tmp_path: Path) -> None:
    """Those of a router or a gated recurrence; `--as dense`, which would not help, is not proposed."""
    model = replace(DECODER.model, recurrent_layer="gated" if mechanism == "lightning" else "plain")
    decoder = replace(DECODER, model=model, attention=AttentionConfig(mechanism=mechanism))
    run = ours.save_run(ours.random_model(decoder), decoder, tmp_path / "run")
    name = "router" if mechanism != "lightning" else "key"
    for as_dense in (False, True):
        message = message_of(lambda folder, dense=as_dense: export_model(run, folder, as_dense=dense), tmp_path / "out")
        assert (
            f"attention.mechanism='{mechanism}' gives the model blocks.0.attention.{name}.weight of shape [" in message
        )
        assert "--as dense" not in message
    assert not (tmp_path / "out").exists()


def message_of(use: Callable[[Path], Any], folder: Path) -> str:
    try:
        use(folder)
    except FarspanError as error:
        return str(error)
    return "no error"


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """In all files that a start, an export and pool-heads read, of imported weights and of another run."""
    ours.save_run(ours.random_model(DECODER), DECODER, tmp_path / "first")
    export_model(tmp_path / "first", tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json"):
        (tmp_path / "theirs" / name).write_text('{"eos_token_id": 7}')
    weights, run = tmp_path / "weights", tmp_path / "run"
    import_model(tmp_path / "theirs", weights)
    ours.save_run(ours.random_model(DECODER), DECODER, run)
    keep_in_run(weights, tmp_path / "no data", run)
    step = run / "checkpoints" / "step_00000001"
    model = ours.random_model(DECODER)

    def start(folder: Path) -> None:
        with connected(Ranks(), ours.CPU):
            load_weights(model, folder)
        keep_in_run(folder, tmp_path / "no data", tmp_path / "started")

    uses: dict[str, Callable[[Path], Any]] = {
        "start": start,
        "export": lambda folder: export_model(folder, tmp_path / "out"),
        "pool": lambda folder: pool_heads(folder, 1, tmp_path / "pooled"),
    }
    missed, tried = [], set()
    for folder, root in ((weights, weights), (step, run)):
        for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "config.toml"):
            content, tried = path.read_bytes(), tried | {path.name}
            for place in (0, len(content) // 2, len(content) - 1):
                path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
                messages = {name: message_of(use, folder) for name, use in uses.items()}
                missed += [(name, path, place) for name, message in messages.items() if "damaged" not in message]
            path.write_bytes(content)
    assert missed == []
    assert {"__0_0.distcp", ".metadata", "manifest.json", "model.toml", "tokenizer.json", "tensors.json"} <= tried
    start(weights)
    start(step)


def test_unreadable_weights_without_a_manifest_are_called_damaged(tmp_path: Path) -> None:
    """As older versions wrote them. Another model is another sentence."""
    weights, model = tmp_path / "weights", ours.random_model(DECODER)
    with connected(Ranks(), ours.CPU):
        save_weights(model.state_dict(), weights, DECODER)
        (weights / "manifest.json").unlink()
        load_weights(model, weights)
        wider = ours.random_model(replace(DECODER, model=replace(DECODER.model, width=64)))
        with pytest.raises(CheckpointError, match=r"does not fill this model \(\S+ has shape .*change model\.\*"):
            load_weights(wider, weights)
        (weights / "__0_0.distcp").write_bytes(b"cut")
        with pytest.raises(CheckpointError, match=r"weights is damaged \(.*write it again"):
            load_weights(model, weights)
        (weights / ".metadata").write_bytes(b"cut")
        with pytest.raises(CheckpointError, match=r"weights is damaged \(\.metadata is unreadable: .*write it again"):
            load_weights(model, weights)


def test_settings_that_differ_from_those_of_the_weights_are_listed(tmp_path: Path) -> None:
    """They fill the model whatever its attention, norms and RoPE are."""
    window = AttentionConfig(mechanism="window", options={"window": 37})
    config = replace(ours.run_config(DECODER, tmp_path), attention=replace(window, backend="cpu"))
    with connected(Ranks(), ours.CPU):
        save_weights(ours.random_model(DECODER).state_dict(), tmp_path / "weights", replace(DECODER, attention=window))
        save_weights(ours.random_model(DECODER).state_dict(), tmp_path / "bare")
    model = config.model
    assert other_settings(config, tmp_path / "weights") == []
    unscaled = replace(config, model=replace(model, rope=replace(model.rope, original_positions=7)))
    assert other_settings(unscaled, tmp_path / "weights") == []
    changed = replace(config, model=replace(model, norm_epsilon=1e-4), attention=AttentionConfig())
    assert other_settings(changed, tmp_path / "weights") == [
        "model.norm_epsilon (1e-06, now 0.0001)", "attention.mechanism (window, now dense)",
    ]  # fmt: skip
    assert other_settings(changed, tmp_path / "bare") == []


def test_numbers_that_the_model_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensors = ours.random_model(DECODER).double().state_dict()
    tensors["blocks.0.attention.key.weight"][3, 4] = 1e300
    model = ours.random_model(DECODER)
    with connected(Ranks(), ours.CPU):
        save_weights(tensors, tmp_path / "weights", DECODER)
        message = r"numbers in blocks\.0\.attention\.key\.weight that are not finite in torch\.float32"
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, tmp_path / "weights")
        load_weights(model.double(), tmp_path / "weights")


def load_spoiled(weights: Path) -> str:
    """On each rank, with its shard: return the error for numbers that are on one rank only."""
    config = replace(tiny.config(weights, weights, ParallelConfig(dp_shard=2)), model=DECODER.model)
    config = replace(config, train=replace(config.train, compute_dtype="float32"))
    model = build_model(config, Mesh.build(config.parallel, "cpu"), ours.CPU)
    return error_of(CheckpointError, load_weights, model, weights)


@pytest.mark.parametrize("row", [0, -1])
def test_numbers_on_one_rank_are_refused_on_all(ranks: Pools, tmp_path: Path, row: int) -> None:
    tensors = ours.random_model(DECODER).state_dict()
    tensors["head.weight"][row, 3] = float("nan")
    with connected(Ranks(), ours.CPU):
        save_weights(tensors, tmp_path / "weights", DECODER)
    message = f"rank {-row}: {tmp_path}/weights has numbers in head.weight that are not finite"
    for found in ranks(2).run(load_spoiled, tmp_path / "weights"):
        assert found.startswith(message)


def load_tied(two: Path, one: Path) -> str:
    """On each rank, with its shards: return the error for two tables, after loading one."""
    config = replace(tiny.config(two, two, ParallelConfig(dp_shard=2)), model=TIED.model)
    model = build_model(config, Mesh.build(config.parallel, "cpu"), ours.CPU)
    load_weights(model, one)
    return error_of(CheckpointError, load_weights, model, two)


def test_two_tables_do_not_fill_a_tied_model(ranks: Pools, tmp_path: Path) -> None:
    tensors = ours.random_model(DECODER).state_dict()
    with connected(Ranks(), ours.CPU):
        save_weights(tensors, tmp_path / "two", DECODER)
        with pytest.raises(
            CheckpointError, match=r"differs from its embedding\.weight: set model\.tied_embeddings=false"
        ):
            load_weights(ours.random_model(TIED), tmp_path / "two")
        model = ours.random_model(TIED)
        save_weights(tensors | {"head.weight": tensors["embedding.weight"]}, tmp_path / "one", DECODER)
        load_weights(model, tmp_path / "one")
    for message in ranks(2).run(load_tied, tmp_path / "two", tmp_path / "one"):
        assert "differs from its embedding.weight" in message
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, tensors["embedding.weight"])
