import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from farspan.parallel.comm import Traffic
from farspan.parallel.layout import LAYOUTS
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.tools.rank_pool import RankError
from farspan.trainer.batch import DataLoader, MicroBatch
from farspan.trainer.build import build_batches
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PackedSequence, sequence_hash, sequence_seed
from tests.support import tiny
from tests.support.rank_pool import Pools

SEQUENCE = PackedSequence(
    tokens=np.arange(100, 111),
    labels=np.array([101, 102, 103, IGNORED, 105, 106, 107, 108, 109, IGNORED, IGNORED]),
    position=np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0], dtype=np.int32),
    document=np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, -1], dtype=np.int32),
)


def build_batch(config: Config, index: int = 0) -> MicroBatch:
    mesh = Mesh.build(config.parallel, "cpu")
    return build_batches(config, mesh, torch.device("cpu"), Traffic()).build(SEQUENCE, index)


def build(config: Config) -> tuple[list[list[int]], int, int]:
    batch = build_batch(config)
    rows = batch.context.rows
    columns = [x.tolist() for x in (batch.tokens, batch.labels, rows.position, rows.document)]
    return columns, batch.valid_tokens, batch.attention_flops


def test_labels_are_checked_on_the_host(ranks: Pools) -> None:
    """A device could only end the process."""
    config = tiny.config(Path("none"), Path("none"), ParallelConfig())
    with pytest.raises(RankError, match="label 109 is outside the vocabulary of 109"):
        ranks(1).run(build, tiny.with_model(config, vocabulary_size=109))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_ranks_share_the_full_sequence(ranks: Pools, layout: str) -> None:
    config = tiny.config(Path("none"), Path("none"), ParallelConfig(context=2, layout=layout))
    found = ranks(2).run(build, config)
    found_rows = sorted(row for columns, _, _ in found for row in zip(*columns, strict=True) if row[3] >= 0)
    expected = zip(SEQUENCE.tokens, SEQUENCE.labels, SEQUENCE.position, SEQUENCE.document, strict=True)
    assert found_rows == [tuple(map(int, row)) for row in expected if row[3] >= 0]
    # Padding, the data's and the layout's, has neither label nor document.
    for columns, _, _ in found:
        assert all(row[1] == IGNORED for row in zip(*columns, strict=True) if row[3] < 0)
    assert sum(valid for _, valid, _ in found) == 8
    # Documents of 4 and 6 tokens: 4 * 5 / 2 + 6 * 7 / 2 causal pairs, each 4 FLOPs a feature of a head.
    model = config.model
    assert sum(flops for _, _, flops in found) == 31 * 4 * model.head_dim * model.heads * model.layers


def stream_of(config: Config) -> tuple[int, int]:
    batch = build_batch(config, 5)
    return batch.fingerprint, batch.seed


def test_ranks_of_a_sequence_count_it_once_and_draw_by_its_place(ranks: Pools) -> None:
    config = tiny.config(Path("none"), Path("none"), ParallelConfig(context=2))
    seed = sequence_seed(config.run.seed, 5)
    assert ranks(2).run(stream_of, config) == [(sequence_hash(5, SEQUENCE), seed), (0, seed)]


def test_rank_order_is_the_layouts(ranks: Pools) -> None:
    config = tiny.config(Path("none"), Path("none"), ParallelConfig(context=2, layout="zigzag"))
    config = replace(config, data=replace(config.data, sequence_tokens=11))
    found = ranks(2).run(build, config)
    assert found[0][0][0] == [100, 101, 102, 109, 110, 0]
    assert found[1][0][0] == [103, 104, 105, 106, 107, 108]


def test_the_thread_plans_on_the_device_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread has GPU 0, where each rank of a node would pin memory and launch."""
    set_by: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: set_by.append((threading.current_thread().name, device))
    )
    device = torch.device("cuda", 1)
    builder: Any = SimpleNamespace(device=device, build=lambda sequence, index: len(set_by))
    mesh: Any = SimpleNamespace(data_rank=0, degrees=SimpleNamespace(data=1))
    source: Any = SimpleNamespace(num_tokens=10_000)
    loader = DataLoader(tiny.config(Path("none"), Path("none"), ParallelConfig()), source, mesh, builder)
    monkeypatch.setattr(loader._sequences, "sequence", lambda index: SEQUENCE)
    try:
        built: list[Any] = loader.micro_batches(0, is_last=True)
    finally:
        loader.close()
    assert built
    assert set(built) == {1}
    assert set_by == [("batches_0", device)]
