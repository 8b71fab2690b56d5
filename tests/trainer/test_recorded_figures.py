"""The numbers of speed and traffic in metrics.jsonl against values found in other ways than farspan finds them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from farspan.parallel.mesh import ParallelConfig
from farspan.trainer import evaluate, metrics
from farspan.trainer import train as module
from farspan.trainer.config import CheckpointConfig, Config, EvaluateConfig
from farspan.trainer.data.packing import ShuffledSequences
from farspan.trainer.resolve import open_data
from tests.support import tiny
from tests.support.collectives import SentBytes
from tests.support.rank_pool import Pools
from tests.support.runs import records, run

STEPS = 3
SECONDS = {1: 2.0, 2: 4.0, 3: 0.5}
"""Of each step, by a clock that stands still where the test does not move it."""
MEMORY = (700, 900, 1100, 800)


def measure(config: Config) -> list[Counter[tuple[str, int]]]:
    """On a rank: train; return the bytes sent in each update. Evaluations and saves take 100 seconds."""
    now, sent = [0.0], []
    update, run_evaluation, finish = module.update, evaluate.evaluate, module.Checkpointer.start_saving

    def timed_update(*arguments: Any) -> Any:
        now[0] += SECONDS[len(sent) + 1]
        with SentBytes() as counter:
            result = update(*arguments)
        sent.append(counter.sent)
        return result

    def slow(work: Any) -> Any:
        def work_and_wait(*arguments: Any, **named: Any) -> Any:
            now[0] += 100.0
            return work(*arguments, **named)

        return work_and_wait

    with (
        mock.patch.object(metrics, "time", SimpleNamespace(monotonic=lambda: now[0])),
        mock.patch.object(metrics, "peak_memory_bytes", return_value=MEMORY[dist.get_rank()]),
        mock.patch.object(module, "update", timed_update),
        mock.patch.object(evaluate, "evaluate", slow(run_evaluation)),
        mock.patch.object(module.Checkpointer, "start_saving", slow(finish)),
    ):
        run(config)
    return sent


def flops_of_step(config: Config, step: int) -> int:
    """Forward and backward: 6 for each token and matrix element, 12 head_dim for each head and pair that attends."""
    model = config.model
    width, inner, heads = model.width, model.feed_forward, (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    weights = model.layers * width * (heads + 3 * inner) + width * model.vocabulary_size
    data = ShuffledSequences(open_data(config)[0], sequence_tokens=config.data.sequence_tokens, seed=config.run.seed)
    per_step, flops = config.train.sequences_per_step, 0
    for index in range((step - 1) * per_step, step * per_step):
        document = data.sequence(index).document
        pairs = sum(int((document[: row + 1] == document[row]).sum()) for row in range(len(document)))
        flops += 6 * weights * len(document) + 12 * model.layers * model.heads * model.head_dim * pairs
    return flops


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        (ParallelConfig(context=2, dp_shard=2, strategy="ring"), {}),
        (ParallelConfig(context=2, dp_shard=2, expert=2, strategy="ulysses"), {"experts": tiny.EXPERTS}),
    ],
    ids=["ring", "experts"],
)
def test_speed_and_traffic_are_what_is_measured_elsewhere(
    tiny_data: Path, tmp_path: Path, ranks: Pools, parallel: ParallelConfig, changes: dict[str, Any]
) -> None:
    config = tiny.with_model(tiny.config(tiny_data, tmp_path / "run", parallel, steps=STEPS), **changes)
    config = replace(
        config,
        train=replace(config.train, sequences_per_step=4, compute_dtype="float32"),
        evaluate=EvaluateConfig(every_steps=1, sequences=2),
        checkpoint=CheckpointConfig(every_steps=1),
    )
    sent_by_rank = ranks(4).run(measure, config)
    recorded = [record for record in records(config.run.folder) if "loss" in record]
    assert [record["step"] for record in recorded] == [1, 2, 3]
    for record, sent in zip(recorded, sent_by_rank[0], strict=True):
        step = record["step"]
        assert record["step_s"] == SECONDS[step]
        assert record["tokens_per_s"] == 4 * 101 / SECONDS[step]
        assert record["peak_memory_bytes"] == max(MEMORY)
        # Two micro-batches a rank. Parameters and gradients go over all four ranks, the rest over pairs; sums of a few
        # numbers over all ranks (loss, gradient norm, loads) are not counted.
        of_sharding = sent["_allgather_base_", 4] + sent["_reduce_scatter_base_", 4]
        of_experts = sent["_allgather_base_", 2] + sent["_reduce_scatter_base_", 2]
        between_pairs = sum(size for (name, count), size in sent.items() if count == 2)
        by_kind = record["comm_bytes_by_kind"]
        assert by_kind["fsdp"] == of_sharding + of_experts
        assert record["comm_bytes"] - by_kind["fsdp"] == between_pairs - of_experts > 0
        assert record["comm_bytes"] == sum(by_kind.values())
        if not changes:
            # The peak of each of the four ranks is set to 1e10 by the test's own runs.
            assert record["mfu"] * record["step_s"] * 4e10 == pytest.approx(flops_of_step(config, step), rel=1e-12)
