"""Checkpoints of a sharded model on two real ranks: the same bits back, the right ones kept, other runs refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from farspan.errors import CheckpointError
from farspan.trainer.checkpoint import checkpointer
from farspan.trainer.checkpoint.identity import resume_identity
from farspan.trainer.checkpoint.manifest import Manifest
from farspan.trainer.checkpoint.shards import write_shards
from farspan.trainer.config import Config
from farspan.trainer.model.config import HeadMixtureConfig, RopeConfig
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
    before, state = rank.bits(), replace(state_of(1), recent_losses=[1.0])
    rank.checkpoints.start_saving(state)
    rank.update(2)
    state.step = 5
    state.recent_losses.append(5.0)
    # Collectives of the run itself meet those of the save.
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))
    rank.checkpoints.finish_saving()
    return before


def test_changes_during_a_save_are_not_saved(config: Config, ranks: Pools) -> None:
    saved = ranks(2).run(save_while_training, config)
    for before, (folder, state, after, _) in zip(saved, ranks(2).run(load, config), strict=True):
        assert (folder, state) == ("step_00000001", replace(state_of(1), recent_losses=[1.0]))
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
    """A damaged checkpoint must not take the place of a good one in `keep`, nor be loaded later. So may the next be."""
    config = replace(config, checkpoint=replace(config.checkpoint, keep=1))
    for damaged in (newest, newest.with_name(f"step_{step:08}")):
        (damaged / "manifest.json").write_text("damaged")
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
        # All matrices have the same shapes, the function is not the same.
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


ACCEPT = "or accept it with 'checkpoint.accept_changed=["


def accepting(config: Config, message: str) -> Config:
    """The run that pastes what a message offers."""
    names = re.findall(r"'checkpoint\.accept_changed=(\[.*?\])'", message)
    return replace(config, checkpoint=replace(config.checkpoint, accept_changed=tuple(json.loads(names[0]))))


def refusals(others: list[tuple[Config, str]]) -> list[str]:
    """On a rank: the error that ends each run, given its data's fingerprint."""
    return [error_of(CheckpointError, load, other, fingerprint) for other, fingerprint in others]


def loads(others: list[tuple[Config, str]]) -> list[tuple[str | None, TrainState]]:
    """On a rank: the checkpoint that each run goes on from, and its state."""
    return [load(other, fingerprint)[:2] for other, fingerprint in others]


def fitting_changes(config: Config) -> list[Config]:
    """Runs whose tensors a checkpoint of `config` fills."""
    return [
        tiny.with_model(config, rope=RopeConfig(rotated=4)),
        tiny.with_model(config, rope=RopeConfig(base=5e5)),
        tiny.with_model(config, norm_epsilon=1e-3),
        replace(config, attention=replace(config.attention, mechanism="window", options={"window": 8})),
        replace(config, attention=replace(config.attention, options={"causal": False})),
        replace(config, attention=replace(config.attention, mechanism="moba", options={"block": 8})),
    ]


def misfitting_changes(config: Config) -> list[Config]:
    """Runs that have other tensors than a checkpoint of `config`."""
    models = [
        {"vocabulary_size": 320},
        {"width": 48},
        {"layers": 1},
        {"layers": 3},
        {"heads": 8},
        {"kv_heads": 4},
        # Only the norm of queries and keys differs.
        {"heads": 2, "kv_heads": 1, "head_dim": 16},
        {"feed_forward": 64},
        {"qk_norm": False},
        {"tied_embeddings": True},
        {"parallel_blocks": True},
        {"key_convolution": 3},
        {"experts": tiny.EXPERTS},
        {"head_mixture": HeadMixtureConfig(kind="heads", per_token=1)},
    ]
    mosa = replace(config, attention=replace(config.attention, mechanism="mosa"))
    return [*(tiny.with_model(config, **changes) for changes in models), mosa]


def test_what_a_message_offers_works(config: Config, newest: Path, ranks: Pools) -> None:
    others = [
        (replace(config, run=replace(config.run, seed=12), data=replace(config.data, sequence_tokens=103)), "data"),
        (config, "else"),
        (replace(config, data=replace(config.data, sequence_tokens=103)), "else"),
        *((other, "data") for other in fitting_changes(config)),
    ]
    messages = ranks(2).run(refusals, others)[0]
    assert [message for message in messages if ACCEPT not in message] == []
    # In quotes, to be pasted into a shell, with all that differs.
    assert "data.sequence_tokens (101, now 103), another run.seed (11, now 12)" in messages[0]
    assert (
        '\'checkpoint.accept_changed=["data.sequence_tokens","run.seed"]\', which begins the data anew.' in messages[0]
    )
    willing = [
        (accepting(other, message), fingerprint) for (other, fingerprint), message in zip(others, messages, strict=True)
    ]
    found = ranks(2).run(loads, willing)[0]
    # Other data, or another order of them, begin at their start, and the rest of the state stays.
    assert [state.sequences for _, state in found] == [0, 0, 0] + [4] * len(fitting_changes(config))
    assert {(folder, state.step, state.tokens) for folder, state in found} == {("step_00000002", 2, 200)}
    partly = replace(willing[0][0], checkpoint=replace(config.checkpoint, accept_changed=("data.sequence_tokens",)))
    assert 'accept_changed=["data.sequence_tokens","run.seed"]' in ranks(2).run(refusals, [(partly, "data")])[0][0]


def test_no_change_of_tensors_is_offered_or_taken(config: Config, newest: Path, ranks: Pools) -> None:
    others = [(other, "data") for other in misfitting_changes(config)]
    messages, same = ranks(2).run(refusals, others)
    assert messages == same
    for message in messages:
        assert "and does not fit this model and optimizer (" in message
        assert "accept_changed" not in message
    assert "(model.embedding.weight has shape [264, 32], not [320, 32])" in messages[0]
    assert "model.blocks.1" in messages[2], "layers that are left out"
    assert "has no place in it" in messages[2]
    every = tuple(resume_identity(config, "data"))
    willing = [(replace(o, checkpoint=replace(o.checkpoint, accept_changed=every)), f) for o, f in others]
    for message in ranks(2).run(refusals, willing)[0]:
        assert "step_00000002 does not fit this model and optimizer (" in message
        assert not re.search("restore|accept_changed", message)


def test_sequences_of_another_length_need_data_that_begin_anew(config: Config, newest: Path, ranks: Pools) -> None:
    longer = replace(config, data=replace(config.data, sequence_tokens=103))
    asking = replace(longer, checkpoint=replace(config.checkpoint, accept_changed=("data.sequence_tokens",)))
    for message in ranks(2).run(refusals, [(longer, "data"), (asking, "data")])[0]:
        assert (
            "another data.sequence_tokens (101, now 103), and what is left of the epoch cannot be cut anew" in message
        )
        assert f"run.start_from={newest}" in message
        with_seed = accepting(replace(longer, run=replace(config.run, seed=12)), message)
        ((folder, state),) = ranks(2).run(loads, [(with_seed, "data")])[0]
        assert (folder, state.sequences) == ("step_00000002", 0)


def test_a_setting_that_this_version_lacks_is_not_offered(config: Config, newest: Path, ranks: Pools) -> None:
    manifest = Manifest.read(newest)
    replace(manifest, identity={**manifest.identity, "model.new": 3}).write(newest)
    (message,) = ranks(2).run(refusals, [(config, "data")])[0]
    assert "another model.new (3, now None)" in message
    assert "accept_changed" not in message


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
