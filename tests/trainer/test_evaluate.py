"""Evaluation on ranks against a plain loop over tokens in one process."""

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.build import build_batches
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED, PackedSequences
from farspan.trainer.evaluate import Evaluation, evaluate, share
from farspan.trainer.model.transformer import Output, SequenceContext
from farspan.trainer.resolve import open_data
from tests.support.rank_pool import Pools

SEQUENCE_TOKENS = 150
SEQUENCES = 3
"""Odd, so that two groups cannot share them evenly; the last is padded where the data ends."""


class KnownLoss(nn.Module):
    """A loss that a loop can work out: of the token, its label and its position, and 0 without a label."""

    def forward(self, tokens: Tensor, labels: Tensor, context: SequenceContext) -> Output:
        assert not torch.is_grad_enabled()
        assert not self.training
        losses = tokens * 0.5 + labels * 0.25 + context.rows.position * 0.125
        return Output(torch.where(labels == IGNORED, 0.0, losses), (), ())


def validation(config: Config) -> PackedSequences:
    return PackedSequences(open_data(config)[1], sequence_tokens=SEQUENCE_TOKENS, seed=0, shuffle=False, repeat=False)


def evaluate_on_rank(config: Config, stop_on_rank: int | None) -> tuple[Evaluation | None, int, bool, int]:
    """On each rank: the result, how many batches were run, whether the model is back in training, the ranks' sum."""
    mesh = Mesh.build(config.parallel, "cpu")
    builder, model = build_batches(config, mesh, torch.device("cpu"), Traffic()), KnownLoss()
    ran = 0

    def batches():
        nonlocal ran
        sequences = share(
            validation(config), config.evaluate.sequences, data_rank=mesh.data_rank, groups=mesh.degrees.data
        )
        for sequence in sequences:
            yield builder.build(sequence)
            ran += 1

    result = evaluate(
        model,
        batches(),
        sequence_tokens=SEQUENCE_TOKENS,
        is_stopping=lambda: stop_on_rank == dist.get_rank() and ran == 1,
    )
    # The ranks are still in step: what comes next is not taken for a part of the evaluation.
    number = torch.tensor(10 + dist.get_rank())
    dist.all_reduce(number)
    return result, ran, model.training, int(number)


def by_loop(config: Config) -> tuple[float, int, dict[str, float]]:
    sums, counts = defaultdict(float), defaultdict(int)
    data = validation(config)
    for index in range(min(config.evaluate.sequences, len(data))):
        sequence = data.sequence(index)
        for token, label, position in zip(sequence.tokens, sequence.labels, sequence.position, strict=True):
            if label == IGNORED:
                continue
            name = "0-63" if position < 64 else "64-127" if position < 128 else "128-149"
            sums[name] += float(token * 0.5 + label * 0.25 + position * 0.125)
            counts[name] += 1
    tokens = sum(counts.values())
    return sum(sums.values()) / tokens, tokens, {name: sums[name] / counts[name] for name in sums}


@pytest.fixture(scope="module")
def base(base: Config) -> Config:
    return replace(base, evaluate=replace(base.evaluate, sequences=SEQUENCES))


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(context=2, layout="striped"), ParallelConfig(dp_shard=2)],
    ids=["one rank", "one sequence on two ranks", "a sequence on each rank"],
)
@pytest.mark.parametrize("sequences", [SEQUENCES, 1000], ids=["some", "all"])
def test_equals_a_plain_loop(base: Config, ranks: Pools, parallel: ParallelConfig, sequences: int) -> None:
    config = replace(base, parallel=parallel, evaluate=replace(base.evaluate, sequences=sequences))
    loss, tokens, by_position = by_loop(config)
    assert list(by_position) == ["0-63", "64-127", "128-149"], "the data does not fill the bins"
    for result, _, training, _ in ranks(max(parallel.context, parallel.dp_shard)).run(evaluate_on_rank, config, None):
        assert result.loss == pytest.approx(loss, rel=1e-12)
        assert result.tokens == tokens
        assert result.by_position == pytest.approx(by_position, rel=1e-12)
        assert training


@pytest.mark.parametrize("stop_on_rank", [0, 1])
def test_a_stop_asked_of_one_rank_ends_it_on_all(base: Config, ranks: Pools, stop_on_rank: int) -> None:
    config = replace(base, parallel=ParallelConfig(context=2))
    assert ranks(2).run(evaluate_on_rank, config, stop_on_rank) == [(None, 1, True, 21)] * 2


def evaluate_nothing(config: Config) -> tuple[float, int, dict[str, float]]:
    builder = build_batches(config, Mesh.build(config.parallel, "cpu"), torch.device("cpu"), Traffic())
    sequence = validation(config).sequence(0)
    sequence.labels[:] = IGNORED
    result = evaluate(KnownLoss(), iter([builder.build(sequence)]), sequence_tokens=SEQUENCE_TOKENS)
    assert result is not None
    return result.loss, result.tokens, result.by_position


def test_nothing_to_predict_is_no_loss_on_any_rank(base: Config, ranks: Pools) -> None:
    for loss, tokens, by_position in ranks(2).run(evaluate_nothing, replace(base, parallel=ParallelConfig(context=2))):
        assert math.isnan(loss)
        assert (tokens, by_position) == (0, {})


def test_bits_per_byte() -> None:
    # ln 8 nats are 3 bits, of tokens that stand for 1.5 bytes.
    assert Evaluation(loss=math.log(8), tokens=1, by_position={}).bits_per_byte(1.5) == pytest.approx(2.0)
