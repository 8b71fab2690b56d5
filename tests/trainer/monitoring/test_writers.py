"""Records as files: each step once, also after a resume, and what TensorBoard shows of them."""

import math
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]

from farspan.trainer.monitoring.tags import scalars
from farspan.trainer.monitoring.writers import MetricsWriter
from tests.support.runs import records


def write(folder: Path, steps: range, *, resumed_step: int, value: float) -> None:
    writer = MetricsWriter(folder, resumed_step=resumed_step)
    for step in steps:
        writer.write({"step": step, "loss": value + step, "sent": {"ring": step}, "mfu": None})
        if step % 2 == 0:
            writer.write({"step": step, "eval_loss": value})
    writer.close()


def test_a_resumed_run_writes_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), resumed_step=0, value=100.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write(tmp_path, range(4, 8), resumed_step=3, value=200.0)
    losses = [(record["step"], record["loss"]) for record in records(tmp_path) if "loss" in record]
    assert losses == [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0), (6, 206.0), (7, 207.0)]
    assert [record["eval_loss"] for record in records(tmp_path) if "eval_loss" in record] == [100.0, 200.0, 200.0]


@pytest.mark.parametrize(
    "tail",
    ['{"step": 2', '{"step": 2}', "null\n", '{"loss": 1}\n', "\x00\x00\x00\n"],
    ids=["half a line", "no line end", "no record", "no step", "zeros of a lost page"],
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n' + tail)
    MetricsWriter(tmp_path, resumed_step=9).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.5}\n'


def test_an_unreadable_line_between_records_is_all_that_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f'{{"step": {step}, "loss": 1.5, "eval_loss": 1.0}}\n' for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\x00\x00\n" + "".join(lines[1:]) + "{")
    writer = MetricsWriter(tmp_path, resumed_step=3)
    writer.write({"step": 4, "loss": 2.5})
    writer.close()
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [
        (1, 1.5),
        (2, 1.5),
        (3, 1.5),
        (4, 2.5),
    ]
    assert writer.has_evaluation(3)
    assert f"dropped     unreadable lines of {tmp_path / 'metrics.jsonl'}" in caplog.text


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), resumed_step=0, value=1.0)
    write(tmp_path, range(1, 2), resumed_step=0, value=2.0)
    assert [record["loss"] for record in records(tmp_path)] == [3.0]


def test_it_knows_which_steps_were_evaluated(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), resumed_step=0, value=1.0)
    writer = MetricsWriter(tmp_path, resumed_step=3)
    assert [writer.has_evaluation(step) for step in range(1, 6)] == [False, True, False, False, False]
    writer.write({"step": 5, "eval_loss": 1.0})
    assert writer.has_evaluation(5)
    writer.close()


def test_a_number_that_json_does_not_have_is_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0)
    writer.write({"step": 1, "loss": math.nan, "load": {"0": math.inf, "1": 2.0}, "why": "the loss is nan"})
    writer.close()
    assert records(tmp_path) == [{"step": 1, "loss": None, "load": {"0": None, "1": 2.0}, "why": "the loss is nan"}]


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def shown(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_the_resumed_steps_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), resumed_step=0, value=100.0)
    write(tmp_path, range(4, 7), resumed_step=3, value=200.0)
    events = events_of(tmp_path)
    losses = [(1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0), (6, 206.0)]
    evaluations = [(2, 100.0), (4, 200.0), (6, 200.0)]
    for tag, values in {"train/loss": losses, "Loss/train": losses, "eval/loss": evaluations}.items():
        assert shown(events, tag) == values, tag
    assert [value for _, value in shown(events, "train/sent/ring")] == [1, 2, 3, 4, 5, 6]


STEP: dict[str, Any] = {
    "step": 7, "loss": 2.5, "grad_norm": 0.5, "tokens_per_s": 10.0, "mfu": None, "peak_memory_bytes": 9,
    "comm_bytes": 3, "comm_bytes_by_kind": {"ring": 1, "fsdp": 2}, "comm_bytes_received_by_kind": {"ring": 1},
    "learning_rate": 0.1, "tokens": 70, "step_s": 4.0, "stream": "ab", "skipped": 0,
    "skipped_since": "the loss is nan",
    "expert_balance_loss": 0.25, "expert_load": {"0": 1.5, "1": None}, "head_load": {"0": 1.25},
}  # fmt: skip
EVALUATION = {
    "step": 7, "eval_loss": 2.25, "eval_tokens": 60, "bits_per_byte": 1.5, "loss_by_position": {"0-63": 3.0},
}  # fmt: skip


def test_tags_are_in_groups() -> None:
    assert dict(scalars(STEP)) == {
        "train/loss": 2.5, "train/grad_norm": 0.5, "train/learning_rate": 0.1, "train/tokens": 70, "train/skipped": 0,
        "speed/tokens_per_s": 10.0, "speed/step_s": 4.0, "speed/peak_memory_bytes": 9,
        "comm/bytes": 3, "comm/bytes_by_kind/ring": 1, "comm/bytes_by_kind/fsdp": 2,
        "comm/bytes_received_by_kind/ring": 1,
        "experts/balance_loss": 0.25, "experts/load/0": 1.5, "experts/head_load/0": 1.25,
    }  # fmt: skip
    assert dict(scalars(EVALUATION)) == {
        "eval/loss": 2.25, "eval/tokens": 60, "eval/bits_per_byte": 1.5, "eval/loss_by_position/0-63": 3.0
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_losses_come_first_in_tensorboard(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resumed_step=0)
    for record in (STEP, EVALUATION):
        writer.write(record)
    writer.close()
    events = events_of(tmp_path)
    tags = sorted(events.Tags()["scalars"])
    # TensorBoard sorts by code points, but for "/" and digits, which come before letters as they do there.
    groups = {group: list(found) for group, found in groupby(tags, lambda tag: tag.partition("/")[0])}
    assert list(groups) == ["Loss", "comm", "eval", "experts", "speed", "train"]
    assert groups["Loss"] == ["Loss/eval", "Loss/train"]
    assert shown(events, "Loss/eval") == shown(events, "eval/loss") == [(7, 2.25)]
    (layout,) = events.Tensors("custom_scalars__config__")
    charts = Layout.FromString(layout.tensor_proto.string_val[0])
    assert [category.title for category in charts.category] == ["train", "eval", "comm", "experts"]
    assert list(charts.category[0].chart[0].multiline.tag) == ["train/loss", "eval/loss"]
