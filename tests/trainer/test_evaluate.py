"""Evaluation on ranks against plain loops over tokens in one process, and against the text of the labels."""

import math
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.parallel.comm import Traffic
from farspan.parallel.mesh import Mesh, ParallelConfig
from farspan.trainer.batch import BatchThread
from farspan.trainer.build import build_batches
from farspan.trainer.config import Config
from farspan.trainer.data.packing import IGNORED
from farspan.trainer.data.prepare import prepare
from farspan.trainer.data.source import TokenSource
from farspan.trainer.data.tokenizer import load_tokenizer
from farspan.trainer.data.validation import ValidationSet
from farspan.trainer.evaluate import Evaluation, Validation, evaluate
from farspan.trainer.model.transformer import Output, SequenceContext
from farspan.trainer.resilience.signals import StopSignal
from farspan.trainer.resolve import open_all_data
from tests.support import tiny
from tests.support.bpe import byte_level_bpe
from tests.support.rank_pool import Pools

SEQUENCE_TOKENS = 150
SEQUENCES = 3
"""Odd, so that two groups cannot share them evenly."""
MESHES = {
    "one rank": (1, ParallelConfig()),
    "one sequence on two ranks": (2, ParallelConfig(context=2, layout="striped")),
    "a sequence on each of two ranks": (2, ParallelConfig(dp_shard=2)),
    "two sequences, each on two ranks": (4, ParallelConfig(dp_shard=2, context=2)),
}


class KnownLoss(nn.Module):
    """A loss that a loop can work out: of the token, its label and its position, and 0 without a label."""

    def forward(self, tokens: Tensor, labels: Tensor, context: SequenceContext) -> Output:
        assert not torch.is_grad_enabled()
        assert not self.training
        losses = tokens * 0.5 + labels * 0.25 + context.rows.position * 0.125
        return Output(torch.where(labels == IGNORED, 0.0, losses), (), ())


def validation(config: Config) -> ValidationSet:
    return open_all_data(config)[1]["eval"]


def evaluate_on_rank(config: Config, stop_on_rank: int | None) -> tuple[Evaluation | None, int, bool, int]:
    """On each rank: the result, how many batches were run, whether the model is back in training, the ranks' sum."""
    mesh = Mesh.build(config.parallel, "cpu")
    builder, model = build_batches(config, mesh, torch.device("cpu"), Traffic()), KnownLoss()
    ran = 0

    def batches():
        nonlocal ran
        for place in validation(config).share(data_rank=mesh.data_rank, groups=mesh.degrees.data):
            yield builder.build(validation(config).sequence(place))
            ran += 1

    result = evaluate(
        model,
        batches(),
        sequence_tokens=SEQUENCE_TOKENS,
        vocabulary_size=257,
        is_stopping=lambda: stop_on_rank == dist.get_rank() and ran == 1,
    )
    # The ranks are still in step: what comes next is not taken for a part of the evaluation.
    number = torch.tensor(10 + dist.get_rank())
    dist.all_reduce(number)
    return result, ran, model.training, int(number)


def by_loop(config: Config) -> tuple[float, int, dict[str, float]]:
    sums, counts = defaultdict(float), defaultdict(int)
    drawn = validation(config)
    for index in drawn.indexes:
        sequence = drawn.data.sequence(index)
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
    return replace(
        base,
        data=replace(base.data, sequence_tokens=SEQUENCE_TOKENS),
        evaluate=replace(base.evaluate, sequences=SEQUENCES),
    )


@pytest.mark.parametrize(("num_ranks", "parallel"), MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("sequences", [SEQUENCES, 1000], ids=["some", "all"])
def test_equals_a_plain_loop(
    base: Config, ranks: Pools, num_ranks: int, parallel: ParallelConfig, sequences: int
) -> None:
    config = replace(base, parallel=parallel, evaluate=replace(base.evaluate, sequences=sequences))
    loss, tokens, by_position = by_loop(config)
    assert list(by_position) == ["0-63", "64-127", "128-149"], "the data does not fill the bins"
    for result, _, training, _ in ranks(num_ranks).run(evaluate_on_rank, config, None):
        assert result.loss == pytest.approx(loss, rel=1e-12)
        assert result.tokens == tokens
        assert result.by_position == pytest.approx(by_position, rel=1e-12)
        assert training


@pytest.mark.parametrize("stop_on_rank", [0, 1])
def test_a_stop_asked_of_one_rank_ends_it_on_all(base: Config, ranks: Pools, stop_on_rank: int) -> None:
    config = replace(base, parallel=ParallelConfig(context=2))
    assert ranks(2).run(evaluate_on_rank, config, stop_on_rank) == [(None, 1, True, 21)] * 2


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Prepared data of two files whose tokens are of different length, with bytes and with a trained BPE."""
    folder = tmp_path_factory.mktemp("corpora")
    words = [" ".join(f"long{number % 7} words{number % 5}" for number in range(first, 400)) for first in (0, 1)]
    digits = " ".join(str(number * 7919) for number in range(500)) + " été 漢字🙂" * 20
    for name, text in (("a", " ".join(words)), ("b", digits)):
        (folder / f"{name}.txt").write_text(text)
    byte_level_bpe(words, vocabulary_size=290, special=["</s>"]).save(str(folder / "bpe.json"))
    configs = {}
    for name, tokenizer in (("bytes", "bytes"), ("bpe", str(folder / "bpe.json"))):
        prepare(
            [folder / "a.txt", folder / "b.txt"], tokenizer=load_tokenizer(tokenizer), out=folder / name,
            validation_from_ends=True, validation_fraction=0.5,
        )  # fmt: skip
        config = tiny.config(folder / name, Path("nowhere"), ParallelConfig())
        sets = {"whole": folder / name / "train"}
        config = replace(config, evaluate=replace(config.evaluate, sequences=4, sets=sets))
        configs[name] = tiny.with_model(config, vocabulary_size=320)
    return configs


def record_on_rank(config: Config) -> dict[str, Any]:
    """On each rank: what an evaluation of every set puts on record."""
    mesh, metrics = Mesh.build(config.parallel, "cpu"), mock.Mock()
    builder = build_batches(config, mesh, torch.device("cpu"), Traffic())
    _, sets = open_all_data(config)
    with closing(BatchThread(torch.device("cpu"))) as thread:
        evaluation = Validation(config, sets, mesh, builder, thread, StopSignal(), mock.MagicMock())
        assert not evaluation.run(KnownLoss(), 7, metrics)
    return metrics.write.call_args.args[0]


def label_bytes(folder: Path, label: int) -> int:
    """The bytes of a label by its text in the tokenizer's file, where each character stands for a byte."""
    if not (folder.parent / f"{folder.name}.json").exists():
        return int(label < 256)
    tokenizers = pytest.importorskip("tokenizers")
    text = tokenizers.Tokenizer.from_file(str(folder.parent / f"{folder.name}.json")).id_to_token(label)
    return 0 if text == "</s>" else len(text)


def figures(config: Config, split: str, drawn: list[int] | None) -> dict[str, float]:
    """What a set has on record, from the tokens on disk by loops; drawn: indexes of sequences, None for all."""
    source, length = TokenSource(config.data.folder / split), config.data.sequence_tokens
    loss, num_bytes, labels, position = 0.0, 0, Counter(), 0
    stream = source.tokens.tolist()
    for place, token in enumerate(stream):
        position = 0 if place % length == 0 or stream[place - 1] == source.end_id else position + 1
        if token == source.end_id or (drawn is not None and place // length not in drawn):
            continue
        label = stream[place + 1]
        loss += token * 0.5 + label * 0.25 + position * 0.125
        labels[label] += 1
        num_bytes += label_bytes(config.data.folder, label)
    tokens = labels.total()
    entropy = -sum(number * math.log2(number / tokens) for number in labels.values())
    return {
        "loss": loss / tokens,
        "tokens": tokens,
        "bits_per_byte": loss / math.log(2) / num_bytes,
        "unigram_bits_per_byte": entropy / num_bytes,
    }


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_figures_are_those_of_the_decoded_labels(corpora: dict[str, Config], ranks: Pools, tokenizer: str) -> None:
    config = corpora[tokenizer]
    drawn = open_all_data(config)[1]["eval"].indexes
    own = figures(config, "validation", list(drawn))
    whole = figures(config, "train", list(open_all_data(config)[1]["whole"].indexes))
    expected = {"step": 7, "eval_loss": own.pop("loss"), "eval_tokens": own.pop("tokens"), **own}
    expected |= {f"whole_{key}": value for key, value in whole.items()}
    for num_ranks, parallel in MESHES.values():
        for record in ranks(num_ranks).run(record_on_rank, replace(config, parallel=parallel)):
            numbers = {key: value for key, value in record.items() if not key.endswith("by_position")}
            assert numbers == pytest.approx(expected, rel=1e-12)
            assert record.keys() - numbers.keys() == {"loss_by_position", "whole_loss_by_position"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bytes_of_a_whole_split_are_those_of_its_text(corpora: dict[str, Config], ranks: Pools, tokenizer: str) -> None:
    config = replace(corpora[tokenizer], evaluate=replace(corpora[tokenizer].evaluate, sequences=1000))
    record = ranks(1).run(record_on_rank, config)[0]
    source = TokenSource(config.data.folder / "validation")
    # All text but the first token of each of the two documents, in which each character is a byte.
    firsts = sum(label_bytes(config.data.folder, int(source.document(index)[0])) for index in range(2))
    loss_bits = record["eval_loss"] * record["eval_tokens"] / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(loss_bits / (source.num_bytes - firsts), rel=1e-12)


def test_without_the_bytes_of_tokens_there_are_no_bits_per_byte() -> None:
    found = evaluation_of([0, 3, 5])
    assert found.record(None) == {"loss": 2.0, "tokens": 8, "loss_by_position": {"0-63": 2.0}}
    # Only end tokens were predicted: no byte to divide by.
    assert found.record(torch.tensor([1, 0, 0]).numpy()) == found.record(None)


def test_bits_per_byte_by_hand() -> None:
    record = evaluation_of([0, 3, 5]).record(torch.tensor([9, 1, 2]).numpy())
    assert record["bits_per_byte"] == pytest.approx(2.0 * 8 / math.log(2) / 13)
    assert record["unigram_bits_per_byte"] == pytest.approx((3 * math.log2(8 / 3) + 5 * math.log2(8 / 5)) / 13)


def evaluation_of(label_counts: list[int]) -> Evaluation:
    counts = torch.tensor(label_counts).numpy()
    return Evaluation(loss=2.0, label_counts=counts, before_counts=counts, by_position={"0-63": 2.0})


def test_a_stop_between_sets_records_nothing(corpora: dict[str, Config], ranks: Pools) -> None:
    assert ranks(2).run(stop_in_second_set, replace(corpora["bytes"], parallel=ParallelConfig(dp_shard=2))) == [0, 0]


def stop_in_second_set(config: Config) -> int:
    """On each rank: how many records an evaluation left that was stopped after the first set."""
    mesh, metrics, watchdog, stop = Mesh.build(config.parallel, "cpu"), mock.Mock(), mock.MagicMock(), mock.Mock()
    # Two sequences each of the first set.
    type(stop).requested = mock.PropertyMock(side_effect=lambda: watchdog.restart.call_count > 2)
    builder = build_batches(config, mesh, torch.device("cpu"), Traffic())
    with closing(BatchThread(torch.device("cpu"))) as thread:
        evaluation = Validation(config, open_all_data(config)[1], mesh, builder, thread, stop, watchdog)
        assert evaluation.run(KnownLoss(), 7, metrics)
    return metrics.write.call_count
