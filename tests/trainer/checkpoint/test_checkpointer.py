"""Checkpoints of a sharded model on two real ranks: the same bits back, the right ones kept, other runs refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint import checkpointer
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.checkpoint.shards import write_shards
from farspan.trainer.config import Config
from farspan.trainer.model.config import RopeConfig
from farspan.trainer.state import TrainState
from tests.support import tiny
from tests.support.checkpoint_ranks import Bits, RankState, files, load, same_bits, save, state_of
from tests.support.rank_pool import Pools, error_of
from tests.trainer.checkpoint.conftest import small


def test_the_same_bits_come_back(config: Config, ranks: Pools) -> None:
    saved = ranks(2).run(save, config, [5, 6])
    loaded = ranks(2).run(load, config)
    for (_, before), (folder, state, after, _) in zip(saved, loaded, strict=True):
        assert folder == "step_00000006"
        assert state == TrainState(step=6, sequences=12, tokens=600)
        assert any("exp_avg_sq" in name for name in before)
        assert same_bits(before, after)
    assert not torch.equal(saved[0][0]["embedding.weight.value"], saved[0][1]["embedding.weight.value"])


def save_while_training(config: Config) -> Bits:
    """Save in the background, and change parameters, optimizer and TrainState meanwhile; return the bits before."""
    rank = RankState(config)
    rank.update(1)
    before, state = rank.bits(), state_of(1)
    rank.checkpoints.start_saving(state)
    rank.update(2)
    state.step = 5
    # Collectives of the run itself meet those of the save.
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    rank.checkpoints.finish_saving()
    return before


def test_changes_during_a_save_are_not_saved(config: Config, ranks: Pools) -> None:
    saved = ranks(2).run(save_while_training, config)
    for before, (folder, state, after, _) in zip(saved, ranks(2).run(load, config), strict=True):
        assert (folder, state.step) == ("step_00000001", 1)
        assert same_bits(before, after)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_thread_that_writes_leaves_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread has device 0: synchronizing would make a CUDA context there, for every rank of the node."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("uses a GPU"))
    assert sorted(write_shards({"model": {"x": torch.ones(3)}}, tmp_path)) == [".metadata", "__0_0.distcp"]


def test_the_newest_are_kept(config: Config, ranks: Pools) -> None:
    ranks(2).run(save, config, [9, 99_999_999, 100_000_000])
    assert files(config.run.folder / "checkpoints") == ["step_100000000", "step_99999999"]
    assert ranks(2).run(load, config)[0][0] == "step_100000000"


def test_some_are_kept_for_good(tmp_path: Path, ranks: Pools) -> None:
    config = small(tmp_path, keep=1, permanent_every_steps=20)
    ranks(2).run(save, config, [10, 20, 30, 40, 50, 60])
    assert files(config.run.folder / "checkpoints") == [f"step_000000{step}" for step in (20, 40, 60)]


def test_an_unfinished_save_is_ignored_and_cleared_away(config: Config, newest: Path, ranks: Pools) -> None:
    newest.rename(newest.with_name(".step_00000002.partial"))
    assert ranks(2).run(load, config)[0][0] == "step_00000001"
    ranks(2).run(save, config, [3])
    assert files(newest.parent) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_renames_the_damaged_checkpoints_it_trains_past(
    config: Config, newest: Path, ranks: Pools, step: int
) -> None:
    """A damaged checkpoint must not take the place of a good one in `keep`, nor be loaded later."""
    (newest / "manifest.json").write_text("damaged")
    config = replace(config, checkpoint=replace(config.checkpoint, keep=1))
    saved = ranks(2).run(save, config, [step])
    folder, _, after, _ = ranks(2).run(load, config)[0]
    assert folder == f"step_{step:08}"
    assert same_bits(saved[0][0], after)
    refused = ["refused_step_00000001", "refused_step_00000002"][step - 1 :]
    assert files(newest.parent) == [*refused, f"step_{step:08}"]


def test_settings_of_the_optimizer_are_the_configurations(config: Config, newest: Path, ranks: Pools) -> None:
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
        (tiny.with_model(config, rope=RopeConfig(rotated=4)), "data", "another model.rope.rotated (0, now 4)"),
        # Fewer layers are all there in the checkpoint.
        (tiny.with_model(config, layers=1), "data", "another model.layers (2, now 1)"),
    ]


def test_another_run_is_refused(config: Config, newest: Path, ranks: Pools) -> None:
    for other, fingerprint, reason in other_runs(config):
        message, same = ranks(2).run(error_of, CheckpointError, load, other, fingerprint)
        assert message == same
        assert message.startswith(f"checkpoint {newest} was trained with {reason}")


def test_changes_are_listed_and_can_be_accepted(config: Config, newest: Path, ranks: Pools) -> None:
    other = replace(config, run=replace(config.run, seed=12), data=replace(config.data, sequence_tokens=103))
    message = ranks(2).run(error_of, CheckpointError, load, other)[0]
    assert "data.sequence_tokens (101, now 103), another run.seed (11, now 12)" in message
    # In quotes, to be pasted into a shell.
    assert '\'checkpoint.accept_changed=["data.sequence_tokens","run.seed"]\'' in message
    accepted = ("run.seed", "data.sequence_tokens")
    willing = replace(other, checkpoint=replace(config.checkpoint, accept_changed=accepted))
    assert ranks(2).run(load, willing)[0][0] == "step_00000002"
    less = replace(willing, checkpoint=replace(willing.checkpoint, accept_changed=accepted[1:]))
    assert "with another run.seed (11, now 12): " in ranks(2).run(error_of, CheckpointError, load, less)[0]


def test_an_accepted_change_of_shapes_is_no_damage(config: Config, newest: Path, ranks: Pools) -> None:
    wider = tiny.with_model(config, width=48)
    wider = replace(wider, checkpoint=replace(config.checkpoint, accept_changed=("model.width",)))
    (message, same) = ranks(2).run(error_of, CheckpointError, load, wider)
    assert message == same
    assert "step_00000002 does not fit this model and optimizer (model." in message
    assert "restore" not in message


def test_settings_that_are_newer_than_a_checkpoint_have_their_defaults(
    config: Config, newest: Path, ranks: Pools
) -> None:
    manifest = Manifest.read(newest)
    before = {name: value for name, value in manifest.identity.items() if name != "model.rope.rotated"}
    replace(manifest, identity=before).write(newest)
    assert ranks(2).run(load, config)[0][0] == "step_00000002"
    other = tiny.with_model(config, rope=RopeConfig(rotated=4))
    assert "another model.rope.rotated (0, now 4)" in ranks(2).run(error_of, CheckpointError, load, other)[0]


def test_another_format_is_refused(config: Config, newest: Path, ranks: Pools) -> None:
    (newest / "manifest.json").write_text(json.dumps({"format": 1, "identity": {}, "train_state": {}, "files": {}}))
    assert "has format 1 but this farspan reads 2" in ranks(2).run(error_of, CheckpointError, load, config)[0]


def test_all_ranks_report_a_folder_that_cannot_be_written(config: Config, ranks: Pools) -> None:
    config.run.folder.mkdir()
    (config.run.folder / "checkpoints").write_text("a file in the way")
    messages = ranks(2).run(error_of, CheckpointError, save, config, [3])
    assert messages[0] == messages[1]
    assert "step_00000003 cannot be written (Not a directory)" in messages[0]


def save_without_room(config: Config) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointer.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100_000}))
        return error_of(CheckpointError, save, config, [3])


def test_a_checkpoint_that_does_not_fit_is_not_begun(config: Config, newest: Path, ranks: Pools) -> None:
    messages = ranks(2).run(save_without_room, config)
    assert messages[0] == messages[1]
    assert "and 97.7 KiB are free" in messages[0]
    assert files(newest.parent) == ["step_00000001", "step_00000002"]
