"""The measurement of attention at tiny sizes: what it writes, and that nothing wrong gets a number."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, final

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads, Masked
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planning.plan import Plan
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import contenders as rivals
from farspan.tools.bench.attention import Record, useful_flops
from farspan.tools.bench.case import (
    Case,
    Contender,
    Ours,
    Shape,
    document_lengths,
    find_cases,
    unmasked_share,
)
from farspan.tools.bench.check import SPARSE_SHARE, checks, excess
from farspan.tools.bench.plot import human, log_log
from farspan.tools.bench.run import LeftOut, Limits, judge_all
from farspan.tools.bench.timing import Times
from farspan.tools.bench_attention import main, parse, sizes

FIELDS = [
    "mechanism", "backend", "device", "dtype", "tokens", "heads", "kv_heads", "head_dim", "direction", "ms",
    "useful_tflops", "speedup_over_dense", "ideal_speedup", "fraction_of_ideal", "peak_bytes", "correct",
]  # fmt: skip
TINY = ["--heads", "2:1", "--head-dim", "8", "--tokens", "64,128"]
SHAPE = Shape(heads=Heads(query=2, kv=1), head_dim=8, value_dim=8, dtype=torch.float32, device=torch.device("cpu"))


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Toy(Masked):
    """Every token sees itself and the one before."""

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(),)

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(window=2)


class WrongBackend(Backend):
    """The reference, but for one query of one head, whose gradient comes out twice as large."""

    rank = 1000

    def unsupported_reason(self, device: torch.device) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        return BACKENDS.get("reference").forward(q, k, v, plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = BACKENDS.get("reference").backward(dout, q, k, v, out, lse, plan)
        dq[5, 0] *= 2
        return dq, dk, dv


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main([*TINY, *arguments, "--out", str(out)]) == 0
    return json.loads(out.with_suffix(".json").read_text())


def test_writes_records_tables_machine_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run with a mechanism and a backend that were registered a moment ago, the backend wrong."""
    monkeypatch.setitem(MECHANISMS._parts, "toy", Toy)
    monkeypatch.setitem(BACKENDS._parts, "wrong", WrongBackend())
    chosen = ["--mechanisms", "dense,toy", "--backends", "cpu,wrong", "--memory", "64,128"]
    records = run(tmp_path / "new" / "bench", *chosen)
    assert [list(record) for record in records] == [FIELDS] * len(records)
    assert [part.name for part in fields(Record)] == FIELDS
    pairs = {(record["mechanism"], record["backend"]) for record in records}
    assert pairs == {
        ("dense", "cpu"), ("dense", "wrong"), ("dense", "torch_sdpa"), ("dense_varlen", "cpu"),
        ("dense_varlen", "wrong"), ("toy", "cpu"), ("toy", "wrong"),
    }  # fmt: skip
    assert len(records) == len(pairs) * 2 * 3
    numbers = ("ms", "useful_tflops", "speedup_over_dense", "fraction_of_ideal", "peak_bytes")
    for record in records:
        assert record["correct"] == (record["backend"] != "wrong")
        for number in numbers:
            assert (record[number] is None) == (record["backend"] == "wrong"), (number, record)
        if record["mechanism"] == "dense":
            assert record["ideal_speedup"] == 1
        if record["mechanism"] == "toy":
            tokens = record["tokens"]
            assert record["ideal_speedup"] == tokens * (tokens + 1) / 2 / (2 * tokens - 1)
        if record["correct"]:
            assert record["fraction_of_ideal"] == record["speedup_over_dense"] / record["ideal_speedup"]
            if (record["mechanism"], record["backend"]) == ("dense", "cpu"):
                assert record["speedup_over_dense"] == 1
    check_files(tmp_path / "new")
    said = capsys.readouterr().out
    assert "toy by wrong: NOT CORRECT: Toy(), 1024 tokens, 2:1 heads" in said
    assert "dq has error" in said


def check_files(folder: Path) -> None:
    machine = json.loads((folder / "bench_machine.json").read_text())
    assert {"date", "commit", "command", "cpu", "threads", "torch", "triton"} <= set(machine)
    text = (folder / "bench.md").read_text()
    assert "![time against tokens](bench.svg)" in text
    assert text.count("| toy | wrong | not correct |") == 2
    assert "| toy by cpu |" in text.split("## Peak memory")[1]
    plot = ElementTree.parse(folder / "bench.svg").getroot()
    lines = [element for element in plot if element.tag.endswith("polyline")]
    assert len(lines) == 4, "dense by two, dense_varlen and toy by cpu"
    assert "toy, cpu" in [element.text for element in plot]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mechanisms", "dens"], "mechanism 'dens' does not exist.* Did you mean 'dense'"),
        (["--mechanisms", "moba_512x9"], "Did you mean 'moba_512x8'"),
        (["--varlen", "nothing"], "mechanism 'nothing' does not exist"),
        (["--backends", "cpuu"], "attention backend 'cpuu' does not exist.* Did you mean 'cpu'"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_cuda_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda needs a CUDA GPU")


@pytest.mark.parametrize(
    "arguments", [["--tokens", "8G"], ["--tokens", ""], ["--heads", "8:3"], ["--heads", "8"], ["--rounds", "2"]]
)
def test_options_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2


def test_sizes_are_read_and_written_as_people_say_them() -> None:
    assert sizes("100,8K, 16k,1M") == [100, 8192, 16384, 1 << 20]
    assert [human(tokens) for tokens in (100, 8192, 1 << 20, 1025)] == ["100", "8K", "1M", "1025"]


def test_every_mechanism_has_rows_that_can_be_planned() -> None:
    cases = find_cases([], ["dense", "moba_512x8"])
    assert cases[0].name == "dense"
    assert {type(case.mechanism) for case in cases} == set(MECHANISMS.load().values())
    by_name = {case.name: case for case in cases}
    assert len(by_name) == len(cases)
    assert by_name["moba_512x8_varlen"].packed
    assert not by_name["moba_512x8"].packed
    for case in cases:
        rows = case.rows(300)
        assert len(rows) == 300
        assert case.mechanism.unmasked_pairs(rows, rows) > 0


def test_filter_takes_mechanisms_and_rows() -> None:
    assert [case.name for case in find_cases(["moba"], [])] == ["dense", "moba_512x8", "moba_128x32"]
    assert [case.name for case in find_cases(["moba_128x32"], [])] == ["dense", "moba_128x32"]


def test_documents_fill_the_sequence_and_none_is_longer_than_a_quarter() -> None:
    lengths = document_lengths(4096)
    assert sum(lengths) == 4096
    assert max(lengths) <= 1024
    assert lengths == document_lengths(4096)
    assert sum(document_lengths(1)) == 1


def test_each_row_is_checked_where_it_is_sparse() -> None:
    window = Case(name="window", mechanism=Window(window=1024))
    found = [(check.mechanism, len(check.rows), check.shape.heads.kv) for check in checks(window, SHAPE, True)]
    assert found[0] == (Window(window=1024), 1024, 1)
    assert all((example, 1024, 1) in found for example in Window.examples())
    assert found[-1] == (Window(window=1024), 2048, 1)
    moba = Case(name="moba", mechanism=MoBA(block=512, top_k=8))
    assert min(unmasked_share(check.mechanism, check.rows) for check in checks(moba, SHAPE, True)) < SPARSE_SHARE


def test_examples_for_shorter_documents_are_passed_over() -> None:
    row = Case(name="block_sparse_25", mechanism=BlockSparse(density=0.25))
    named = [str(check) for check in checks(row, SHAPE, True)]
    assert any("density=0.4" in name for name in named)
    assert not any("mask=('1'" in name for name in named)


def test_useful_work_counts_visible_pairs_and_two_and_five_products() -> None:
    shape = Shape(heads=Heads(query=4, kv=2), head_dim=16, value_dim=8, dtype=torch.float32, device=SHAPE.device)
    rows = Rows.packed([3])
    pairs = Dense().unmasked_pairs(rows, rows)
    assert pairs == 6
    assert useful_flops(pairs, shape, "fwd") == 6 * 4 * (2 * 16 + 2 * 8)
    assert useful_flops(pairs, shape, "bwd") == 2.5 * useful_flops(pairs, shape, "fwd")
    assert useful_flops(pairs, shape, "fwd_bwd") == 3.5 * useful_flops(pairs, shape, "fwd")


def test_speedup_is_the_median_of_ratios_within_rounds() -> None:
    """The machine was ten times slower in the second round: it does not count."""
    mine, dense = Times([1.0, 10.0, 1.0], [1.0, 10.0, 1.0]), Times([3.0, 30.0, 4.0], [5.0, 50.0, 4.0])
    assert mine.speedup_over(dense, "fwd") == 3.0
    assert mine.speedup_over(dense, "fwd_bwd") == 4.0
    assert (mine.median("fwd_bwd"), mine.least("fwd_bwd")) == (2.0, 2.0)


def test_errors_are_told_from_rounding() -> None:
    exact = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert excess(exact.float(), exact, None, 1.0) == ""
    assert "error" in excess(exact.float() * (1 + 1e-4), exact, None, 1.0)
    rounded = exact.bfloat16()
    assert excess(rounded, exact, rounded, 1.0) == ""
    one_row = rounded.clone()
    one_row[3] += 0.1
    assert "largest error" in excess(one_row, exact, rounded, 1.0) or "error" in excess(one_row, exact, rounded, 1.0)
    assert excess(exact.float().log(), exact, None, 1.0) == "is not finite"


def test_limits_say_why_nothing_is_started() -> None:
    open_ended = Limits(rounds=3, case_s=2.0, deadline=float("inf"))
    assert open_ended.unsupported_reason(None) == open_ended.unsupported_reason(1.0) == ""
    assert "over the limit of 2 s" in open_ended.unsupported_reason(3.0)
    assert "budget" in Limits(rounds=3, case_s=2.0, deadline=0.0).unsupported_reason(None)


def test_a_spent_budget_leaves_everything_out_and_says_so(tmp_path: Path) -> None:
    assert run(tmp_path / "bench", "--mechanisms", "dense", "--budget-s", "0") == []
    left_out = (tmp_path / "bench.md").read_text().split("## Left out")[1]
    assert left_out.count("the time budget is used up") == 6


def test_a_plot_of_nothing_and_of_one_point_is_well_formed() -> None:
    for series in ({}, {"a & b": [(1024, 1.0)]}, {"a": [(1024, 0.5), (2048, 900.0)], "b": []}):
        ElementTree.fromstring(log_log(series, "times < 1"))


@pytest.mark.parametrize("rival", rivals.rivals_on(torch.device("cuda")), ids=lambda rival: rival.name)
def test_rivals_refuse_what_they_do_not_compute(rival: Contender) -> None:
    with pytest.raises(ConfigError, match=rival.name):
        rival.plan(MoBA(), Rows.packed([64]), SHAPE)
    if not rival.packed:
        with pytest.raises(ConfigError, match="one document only"):
            rival.plan(Dense(), Rows.packed([32, 32]), SHAPE)


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    plot = ElementTree.fromstring(log_log({f"s{i}": [(1024, 1.0), (2048, 1.0 + i / 1000)] for i in range(12)}, "t"))
    heights = sorted(float(e.attrib["y"]) for e in plot if (e.text or "").startswith("s"))
    assert len(heights) == 12
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 14


def test_what_cannot_be_planned_in_a_shape_is_left_out_with_its_reason() -> None:
    left_out = LeftOut()
    spans = [case for case in find_cases(["spans"], []) if case.name == "spans"]
    with connected(Ranks(), SHAPE.device):
        assert judge_all(spans, [Ours("cpu")], SHAPE, left_out) == []
    assert "8 windows for 2 query heads" in left_out.reasons["spans by cpu"]
