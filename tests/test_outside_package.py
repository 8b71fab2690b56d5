"""Mechanisms of a package outside of the repository: trained by name from a TOML file, and checked on real ranks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import metrics
from farspan.trainer.config import AttentionConfig
from farspan.trainer.toml_config import to_toml
from tests.support import runs, tiny

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = """
[farspan.kernels.mechanisms]
near = their_mechanisms.near:Near
"""
NEAR = '''
from dataclasses import dataclass

import torch

from farspan.kernels.kinds.masked import Masked
from farspan.kernels.kinds.routed import Routed
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.selection import BlockPartition, BlockSelection


@dataclass(frozen=True, kw_only=True)
class Near(Masked):
    """reach: a token sees so many before it, and the first of its document."""

    reach: int = 5

    @classmethod
    def examples(cls):
        return (cls(reach=5),)

    def attention_mask(self):
        return AttentionMask(window=self.reach + 1, sinks=1)


def near(q, k, v, lengths, reach=5):
    """A second implementation."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outs = []
    for q, k, v in zip(*(x.split(lengths) for x in (q, k, v))):
        place = torch.arange(len(q))
        distance = place[:, None] - place
        seen = (distance >= 0) & ((distance <= reach) | (place == 0))
        scores = torch.einsum("thd,shd->hts", q, k) / q.shape[2] ** 0.5
        outs.append(torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outs)


@dataclass(frozen=True, kw_only=True)
class Blocks(Routed):
    """A wrong one: which blocks are chosen depends on the rows that a rank has."""

    block: int = 16

    @classmethod
    def examples(cls):
        return (cls(),)

    def attention_mask(self):
        return AttentionMask(causal=True)

    def key_blocks(self, global_rows):
        return BlockPartition.blocks(global_rows, self.block)

    def latest(self, own, local_shard):
        return own.max()

    def select(self, q, k, local_shard):
        own = local_shard.key_block_of_row
        other = torch.where(own > 0, torch.minimum(own - 1, self.latest(own, local_shard) // 3), -1)
        chosen = torch.stack((own, torch.where(other == own, -1, other)), dim=1).int()  # [rows, 2]
        rows = torch.arange(len(own)).masked_fill(own < 0, -1)
        return BlockSelection.from_lists(rows, local_shard.key_blocks, chosen.expand(q.shape[1], -1, -1))


@dataclass(frozen=True, kw_only=True)
class Summed(Blocks):
    """Another one: all ranks choose alike, but the sum that they agree by is in no formula."""

    def latest(self, own, local_shard):
        count = local_shard.all_reduce_sum(torch.tensor([(own >= 0).sum()]))
        return count // len(local_shard.global_rows) + 3


@dataclass(frozen=True, kw_only=True)
class Broken(Blocks):
    """One that fails."""

    def latest(self, own, local_shard):
        return 1 // 0
'''
CHECK = """
import farspan
from farspan.errors import FarspanError
from their_mechanisms.near import Blocks, Broken, Near, Summed, near

if __name__ == "__main__":
    checked = farspan.testing.check_mechanism(Near, near, ranks=(1, 2))
    assert len(checked) == len(set(checked)), checked
    print(*checked, sep="\\n")
    for mechanism, reference in ((Near(reach=4), near), (Blocks(), None), (Summed, None), (Broken(), None)):
        try:
            farspan.testing.check_mechanism(mechanism, reference, ranks=(2,))
        except (AssertionError, FarspanError) as error:
            print("refused:", error)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package is installed in, as pip does it with `--target`."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "their_mechanisms").mkdir()
    (folder / "their_mechanisms" / "near.py").write_text(NEAR)
    info = folder / "their_mechanisms-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-mechanisms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def python(installed: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=installed, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_trains_by_name(installed: Path, tmp_path: Path) -> None:
    """The losses are those of the window that has the same keys."""
    config = tiny.config(tiny.make_data(tmp_path), tmp_path / "theirs", ParallelConfig(), steps=2)
    optimizer = replace(config.optimizer, warmup_steps=1)
    config = replace(config, optimizer=optimizer, attention=AttentionConfig(mechanism="near", options={"reach": 5}))
    (tmp_path / "near.toml").write_text(to_toml(config))
    python(installed, "-m", "farspan.launch.cli", "train", str(tmp_path / "near.toml"))
    window = AttentionConfig(mechanism="window", options={"window": 6, "sinks": 1})
    with mock.patch.object(metrics, "peak_flops", return_value=1e10):
        runs.run_alone(replace(config, attention=window, run=replace(config.run, folder=tmp_path / "ours")))
    theirs, ours = (
        [record["loss"] for record in runs.records(tmp_path / name) if "loss" in record] for name in ("theirs", "ours")
    )
    assert theirs == pytest.approx(ours, rel=1e-12)
    assert len(set(theirs)) == 2


def test_it_is_checked_under_every_strategy_and_wrong_ones_are_told(installed: Path) -> None:
    (installed / "check.py").write_text(CHECK)
    checked, *refused = python(installed, "check.py").split("refused: ")
    for strategy in ("fetch", "gather", "ring", "single", "ulysses"):
        assert f"Near(reach=5)-{strategy}-" in checked
    assert "Near(reach=5)-single-contiguous-ragged-8:2 and the reference" in checked
    assert len({line.split("-")[2] for line in checked.splitlines()}) == 4, "layouts"
    differs, ranks_differ, uncounted, fails = refused
    assert "Near(reach=4)-single-contiguous-one-8:8: differs from the reference by" in differs
    assert "cases on 2 ranks these differ from one process" in ranks_differ
    assert "Blocks(block=16)-" in ranks_differ
    assert "Summed(block=16)-" in uncounted
    assert "'fetch_choice': 8" in uncounted
    assert "ZeroDivisionError" in fails
    assert "in Broken(block=16)-fetch-" in fails.strip().splitlines()[-1]
