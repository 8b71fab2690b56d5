"""A resumed run is the same run, to the bit: real ranks under torchrun, context-parallel degree 2."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer.config import CheckpointConfig, EvaluateConfig
from farspan.trainer.toml_config import to_toml
from tests.support import tiny
from tests.support.runs import records

STEPS, RESUME_AT = 6, 3


def launch(config_file: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "farspan.launch.cli", "train", str(config_file)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


def checkpoint(folder: Path, step: int, scratch: Path) -> Any:
    dcp_to_torch_save(folder / "checkpoints" / f"step_{step:08d}", scratch)
    return torch.load(scratch, weights_only=False)


def assert_same_bits(a: Any, b: Any, where: str = "checkpoint") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}/{i}")
    else:
        assert a == b, where


EXPERT_RECORDS = ("expert_load", "expert_bias", "expert_balance_loss", "expert_z_loss")
EXPERTS = replace(tiny.EXPERTS, layers="dense, experts")


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    parallel = ParallelConfig(context=2, expert=2)
    config = tiny.config(tiny.make_data(tmp_path), tmp_path / "undisturbed", parallel, steps=STEPS)
    config = tiny.with_model(config, experts=EXPERTS)
    config = replace(
        config,
        train=replace(config.train, compute_dtype="float32"),
        checkpoint=CheckpointConfig(every_steps=RESUME_AT, keep=2),
        evaluate=EvaluateConfig(every_steps=0, sequences=3),
    )
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    (tmp_path / "undisturbed.toml").write_text(to_toml(config))
    launch(tmp_path / "undisturbed.toml")

    # The folder as a run leaves it that was killed after step 3: the last checkpoint is gone, its records are not.
    shutil.copytree(undisturbed, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step_{STEPS:08d}")
    (tmp_path / "resumed.toml").write_text(to_toml(replace(config, run=replace(config.run, folder=resumed))))
    launch(tmp_path / "resumed.toml")

    before, after = records(undisturbed), records(resumed)
    for run in (before, after):
        assert [record["step"] for record in run] == [*range(1, STEPS + 1), STEPS]
    for old, new in zip(before, after, strict=True):
        for name in ("loss", "grad_norm", "tokens", "eval_loss", "loss_by_position", *EXPERT_RECORDS):
            assert old.get(name) == new.get(name), (name, old["step"])
    assert before[-2]["step_s"] != after[-2]["step_s"], "the steps after the resume were not run again"
    assert_same_bits(checkpoint(undisturbed, STEPS, tmp_path / "a.pt"), checkpoint(resumed, STEPS, tmp_path / "b.pt"))
