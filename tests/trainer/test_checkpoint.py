"""Checkpoints of a sharded model on two real ranks: the same bits back, and a clear refusal of everything else."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from farspan.kernels.errors import CheckpointError
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.build import build_model
from farspan.trainer.checkpoint import Checkpointer
from farspan.trainer.config import Config
from farspan.trainer.optim import build_optimizer
from farspan.trainer.state import TrainState
from farspan.trainer.train import identity
from tests.ranks import RankPool
from tests.trainer import tiny

KEEP = 2


class Side:
    """One rank's model, optimizer and checkpointer, with contents that follow from a number."""

    def __init__(self, config: Config, fingerprint: str = "data") -> None:
        self.model = build_model(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"))
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.checkpoints = Checkpointer(
            config.run.folder / "checkpoints",
            self.model,
            self.optimizer,
            identity=identity(config, fingerprint),
            keep=KEEP,
        )

    def update(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number * 2 + dist.get_rank())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            local = parameter.grad.to_local()  # pyright: ignore[reportAttributeAccessIssue]
            local.copy_(torch.randn(local.shape, generator=generator, dtype=local.dtype))
        self.optimizer.step()

    def bits(self) -> dict[str, torch.Tensor]:
        """This rank's shards of everything that a checkpoint holds."""
        found = {}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            for key, value in {"value": parameter, **moments}.items():
                found[f"{name}.{key}"] = (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
        return found


def save(config: Config, steps: list[int]) -> list[dict[str, torch.Tensor]]:
    side, saved = Side(config), []
    for step in steps:
        side.update(step)
        side.checkpoints.save(TrainState(step=step, sequences=2 * step, tokens=100 * step))
        saved.append(side.bits())
    return saved


def load(config: Config, fingerprint: str = "data") -> tuple[str | None, TrainState, dict[str, torch.Tensor], Any]:
    side, state = Side(config, fingerprint), TrainState()
    side.update(77)
    folder = side.checkpoints.load_latest(state)
    return folder and folder.name, state, side.bits(), [group["weight_decay"] for group in side.optimizer.param_groups]


def refusal(config: Config, fingerprint: str = "data") -> str:
    with pytest.raises(CheckpointError) as refused:
        Side(config, fingerprint).checkpoints.load_latest(TrainState())
    dist.barrier()
    return str(refused.value)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = tiny.config(tmp_path / "none", tmp_path / "run", ParallelConfig(context=2))
    return replace(config, train=replace(config.train, compute_dtype="float32"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, ranks: Callable[[int], RankPool]) -> Path:
    """The run folder of two saves; tests work on copies."""
    folder = tmp_path_factory.mktemp("checkpoint")
    base = tiny.config(folder / "none", folder / "run", ParallelConfig(context=2))
    ranks(2).run(save, replace(base, train=replace(base.train, compute_dtype="float32")), [1, 2])
    return folder / "run"


@pytest.fixture
def newest(written: Path, config: Config) -> Path:
    """A copy of the written run in the folder of `config`; its newest checkpoint."""
    shutil.copytree(written, config.run.folder)
    return config.run.folder / "checkpoints" / "step_00000002"


def test_the_same_bits_come_back(config: Config, ranks: Callable[[int], RankPool]) -> None:
    saved = ranks(2).run(save, config, [5, 6])
    loaded = ranks(2).run(load, config)
    for (_, before), (folder, state, after, _) in zip(saved, loaded, strict=True):
        assert folder == "step_00000006"
        assert state == TrainState(step=6, sequences=12, tokens=600)
        assert before.keys() == after.keys()
        assert any("exp_avg_sq" in name for name in before)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not torch.equal(saved[0][0]["embedding.weight.value"], saved[0][1]["embedding.weight.value"])


def test_nothing_saved_is_a_fresh_start(config: Config, ranks: Callable[[int], RankPool]) -> None:
    for folder, state, _, _ in ranks(2).run(load, config):
        assert folder is None
        assert state == TrainState()


def test_the_newest_are_kept(config: Config, ranks: Callable[[int], RankPool]) -> None:
    ranks(2).run(save, config, [9, 99_999_999, 100_000_000])
    names = sorted(path.name for path in (config.run.folder / "checkpoints").iterdir())
    assert names == ["step_100000000", "step_99999999"]
    assert ranks(2).run(load, config)[0][0] == "step_100000000"


def test_an_unfinished_save_is_ignored_and_cleared_away(
    config: Config, newest: Path, ranks: Callable[[int], RankPool]
) -> None:
    newest.rename(newest.with_name(".step_00000002.partial"))
    assert ranks(2).run(load, config)[0][0] == "step_00000001"
    ranks(2).run(save, config, [3])
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_step_is_saved_again_over_what_is_there(
    config: Config, newest: Path, ranks: Callable[[int], RankPool]
) -> None:
    (newest / "manifest.json").write_text("damaged")
    saved = ranks(2).run(save, config, [2])
    assert ranks(2).run(load, config)[0][2].keys() == saved[0][0].keys()
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_00000001", "step_00000002"]


def test_settings_of_the_optimizer_are_the_configurations(
    config: Config, newest: Path, ranks: Callable[[int], RankPool]
) -> None:
    changed = replace(config, optimizer=replace(config.optimizer, weight_decay=0.4))
    assert ranks(2).run(load, config)[0][3] == [0.1, 0.0]
    assert ranks(2).run(load, changed)[0][3] == [0.4, 0.0]


def other_runs(config: Config) -> list[tuple[Config, str, str]]:
    longer = replace(config, data=replace(config.data, sequence_tokens=103))
    return [
        (replace(config, run=replace(config.run, seed=12)), "data", "another run.seed (11, now 12)"),
        (config, "else", "another data.folder ('data', now 'else')"),
        (longer, "data", "another data.sequence_tokens (101, now 103)"),
        # All of the shapes are the same, the function is not.
        (tiny.with_model(config, heads=2, kv_heads=1, head_dim=16), "data", "another model.head_dim (8, now 16)"),
        # Fewer layers are all there in the checkpoint.
        (tiny.with_model(config, layers=1), "data", "another model.layers (2, now 1)"),
    ]


def test_another_run_is_refused(config: Config, newest: Path, ranks: Callable[[int], RankPool]) -> None:
    for other, fingerprint, reason in other_runs(config):
        expected = f"checkpoint {newest} was trained with {reason}: restore it, or start anew with another run.folder."
        assert ranks(2).run(refusal, other, fingerprint) == [expected] * 2


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def rot(file: Path) -> None:
    """Same size, other content."""
    file.write_bytes(b"\x00" * file.stat().st_size)


def edit_manifest(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "short shard": ("__1_0.distcp", truncate, "__1_0.distcp has"),
    "lost shard": ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
    "lost index": (".metadata", Path.unlink, ".metadata is missing"),
    "rotten index": (".metadata", rot, ""),
    "rotten shard": ("__1_0.distcp", rot, ""),
    "lost manifest": ("manifest.json", Path.unlink, "manifest.json is missing or unreadable"),
    "short manifest": ("manifest.json", truncate, "manifest.json is missing or unreadable"),
    "no state": ("manifest.json", lambda file: edit_manifest(file, train_state={}), "manifest.json is missing or"),
    "no files": ("manifest.json", lambda file: edit_manifest(file, files=3), "manifest.json has parts of the wrong"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_refused_with_a_way_out(
    config: Config, newest: Path, ranks: Callable[[int], RankPool], damage: str
) -> None:
    name, harm, reason = DAMAGE[damage]
    harm(newest / name)
    messages = ranks(2).run(refusal, config)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"checkpoint {newest} is damaged ({reason}")
    assert messages[0].endswith(
        "): delete or restore that folder, and the same command resumes from the newest one left; or start anew with "
        "another run.folder."
    )
    assert "\n" not in messages[0]
    shutil.rmtree(newest)
    assert ranks(2).run(load, config)[0][0] == "step_00000001"


def test_another_format_is_refused(config: Config, newest: Path, ranks: Callable[[int], RankPool]) -> None:
    edit_manifest(newest / "manifest.json", format=99)
    assert "has format 99 but this farspan reads 1: use the farspan that wrote it" in ranks(2).run(refusal, config)[0]


def refused_save(config: Config) -> str:
    with pytest.raises(CheckpointError) as refused:
        Side(config).checkpoints.save(TrainState(step=3))
    dist.barrier()
    return str(refused.value)


def test_a_folder_that_cannot_be_written_is_said_by_all_ranks(config: Config, ranks: Callable[[int], RankPool]) -> None:
    config.run.folder.mkdir()
    (config.run.folder / "checkpoints").write_text("a file in the way")
    messages = ranks(2).run(refused_save, config)
    assert messages[0] == messages[1]
    assert "step_00000003 cannot be written (Not a directory): make room, or choose another" in messages[0]
