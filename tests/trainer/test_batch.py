import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from farspan.errors import TrainingError
from farspan.parallel.comm import Traffic
from farspan.parallel.layout import LAYOUTS
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.tools.rank_pool import RankError
from farspan.trainer import batch as module
from farspan.trainer.batch import BatchThread, MicroBatch
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
    """A new thread has GPU 0, where each rank of a node would pin memory and launch, and the stream that computes."""
    found: list[tuple[str, str, object]] = []
    device = torch.device("cuda", 1)

    def note(name: str) -> Callable[[object], None]:
        return lambda of: found.append((threading.current_thread().name, name, of))

    stream = SimpleNamespace(wait_event=note("waits"))
    event = SimpleNamespace(record=note("records"))
    replaced = {"set_device": note("device"), "set_stream": note("stream"), "Stream": lambda device: ("of", device)}
    replaced |= {"Event": lambda: event, "current_stream": lambda device: stream}
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(module, "raise_on_all_ranks", lambda work: work())
    batch: Any = object()
    with closing(BatchThread(device)) as thread:
        assert thread.take([thread.start("a sequence", lambda: batch)]) == [batch]
    assert found == [
        ("batches_0", "device", device),
        ("batches_0", "stream", ("of", device)),
        ("batches_0", "records", stream),
        ("MainThread", "waits", event),
    ]


def build_in_turn(fails_on_rank: int | None, closed_after: int | None) -> tuple[list[int], list[int], str, int]:
    """On each rank: the batches that came, those built, the error, how many threads are left."""
    built: list[int] = []

    def build(number: int) -> Any:
        if number == 2 and dist.get_rank() == fails_on_rank:
            raise ValueError("label 300 is outside\nthe vocabulary")
        built.append(number)
        return number

    came: list[Any] = []
    error = ""
    with closing(BatchThread(torch.device("cpu"))) as thread:
        builds = ((f"sequence {number}", partial(build, number)) for number in range(4))
        try:
            with closing(thread.in_turn(builds)) as batches:
                for batch in batches:
                    came.append(batch)
                    if len(came) == closed_after:
                        break
            in_order = len(built)
        except TrainingError as raised:
            error, in_order = str(raised), len(built)
        # Nothing is built behind what was closed, and the thread is ready for the next ones.
        assert thread.take([thread.start("another", lambda: build(9))]) == [9]
        assert built[in_order:] == [9]
    number = torch.tensor(1)
    dist.all_reduce(number)
    alive = [one for one in threading.enumerate() if one.name.startswith("batches")]
    return came, built[:-1], error, len(alive) + int(number)


def test_batches_are_built_one_ahead(ranks: Pools) -> None:
    assert ranks(2).run(build_in_turn, None, None) == [([0, 1, 2, 3], [0, 1, 2, 3], "", 2)] * 2


def test_what_is_left_early_builds_no_more(ranks: Pools) -> None:
    for came, built, error, left in ranks(2).run(build_in_turn, None, 1):
        assert (came, error, left) == ([0], "", 2)
        # The next one may have been begun, and is then finished.
        assert built in ([0], [0, 1])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_a_sentence_on_all(ranks: Pools, rank: int) -> None:
    reason = "sequence 2 cannot be planned (ValueError: label 300 is outside): see the traceback in the log."
    for came, _, error, left in ranks(2).run(build_in_turn, rank, None):
        assert (came, error, left) == ([0, 1], f"rank {rank}: {reason}", 2)
