"""The measurement of attention at tiny sizes: what it writes, and that nothing wrong gets a number."""

import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

import pytest
import torch
from torch import Tensor

from farspan.errors import ConfigError
from farspan.kernels.backend import BACKENDS, Backend
from farspan.kernels.kinds.masked import Masked
from farspan.kernels.masks.attention_mask import AttentionMask
from farspan.kernels.masks.rows import Rows
from farspan.kernels.mechanism import MECHANISMS, Heads
from farspan.kernels.mechanisms.block_sparse import BlockSparse
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.planning.plan import Plan
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import run as bench_run
from farspan.tools.bench.case import Case, Shape, document_lengths, find_cases, unmasked_share
from farspan.tools.bench.check import SPARSE_SHARE, Verdict, checks, excess
from farspan.tools.bench.contenders import Contender, Ours
from farspan.tools.bench.run import Limits, Pass, Result, Times
from farspan.tools.bench_attention import AttentionBench, AttentionRow, baselines_on, main, useful_flops

RECORDED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "2026-11-26_amd_epyc_attention.json"
TINY = ["--heads", "2:1", "--head-dim", "8", "--tokens", "64,128"]
CPU = torch.device("cpu")
SHAPE = Shape(heads=Heads(query=2, kv=1), head_dim=8, value_dim=8, dtype=torch.float32, device=CPU)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Toy(Masked):
    """Every token sees itself and the one before."""

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (cls(),)

    def attention_mask(self) -> AttentionMask:
        return AttentionMask(window=2)


class ChangedBackend(Backend):
    """The reference, but for a change of dq and dk, in place."""

    rank = 1000

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        self.change = change

    def unavailable_reason(self, device: torch.device) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        return BACKENDS.get("reference").forward(q, k, v, plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = BACKENDS.get("reference").backward(dout, q, k, v, out, lse, plan)
        self.change(dq, dk)
        return dq, dk, dv


WRONG = ChangedBackend(lambda dq, _: dq[5, 0].mul_(2))
"""The gradient of one query of one head comes out twice as large."""


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main([*TINY, *arguments, "--out", str(out)]) == 0
    return json.loads(out.with_suffix(".json").read_text())


def test_writes_records_tables_machine_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run with a mechanism and a backend that were registered a moment ago, the backend wrong."""
    monkeypatch.setitem(MECHANISMS._parts, "toy", Toy)
    monkeypatch.setitem(BACKENDS._parts, "wrong", WRONG)
    chosen = ["--mechanisms", "dense,toy", "--backends", "cpu,wrong", "--memory", "64,128"]
    records = run(tmp_path / "new" / "bench", *chosen)
    assert [list(record) for record in records] == [list(json.loads(RECORDED.read_text())[0])] * len(records)
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
    printed = capsys.readouterr().out
    assert "toy by wrong: NOT CORRECT: Toy(), 1024 tokens, 2:1 heads" in printed
    assert "dq has error" in printed


def check_files(folder: Path) -> None:
    machine = json.loads((folder / "bench_machine.json").read_text())
    assert {"date", "commit", "command", "cpu", "threads", "torch", "triton"} <= set(machine)
    text = (folder / "bench.md").read_text()
    assert "](bench.svg)" in text
    assert text.count("| toy | wrong | not correct |") == 2
    assert "| toy by cpu |" in text.split("## Peak memory")[1]
    texts = {element.text for element in ElementTree.parse(folder / "bench.svg").iter()}
    named = {text for text in texts if text and " by " in text}
    assert named == {"dense by cpu", "dense by torch_sdpa", "dense_varlen by cpu", "toy by cpu"}


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
        assert case.mechanism.unmasked_pairs(rows) > 0


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
    pairs = Dense().unmasked_pairs(rows)
    assert pairs == 6
    assert useful_flops(pairs, shape, "fwd") == 6 * 4 * (2 * 16 + 2 * 8)
    assert useful_flops(pairs, shape, "bwd") == 2.5 * useful_flops(pairs, shape, "fwd")
    assert useful_flops(pairs, shape, "fwd_bwd") == 3.5 * useful_flops(pairs, shape, "fwd")


def test_speedup_is_the_median_of_ratios_within_rounds() -> None:
    """The machine was ten times slower in the second round: it does not count."""
    times, dense = Times([(1.0, 1.0), (10.0, 10.0), (1.0, 1.0)]), Times([(3.0, 5.0), (30.0, 50.0), (4.0, 4.0)])
    slower = Times([(9.0, 9.0), (90.0, 90.0), (9.0, 9.0)])
    row = AttentionRow(Ours("cpu"), find_cases(["dense"], [])[0])
    result = Result(row=row, verdict=Verdict(True, ""), size=8, times=times, baseline=[slower, dense])
    assert result.speedup("fwd") == 3.0
    assert result.speedup("fwd_bwd") == 4.0
    assert (result.ms("fwd_bwd"), min(times.of("fwd_bwd"))) == (2.0, 2.0)


def test_errors_are_more_than_rounding() -> None:
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
    limits = Limits(rounds=9, rounds_s=10.0, row_s=2.0)
    assert limits.reason_to_skip(None) == limits.reason_to_skip(1.0) == ""
    assert "over the limit of 2 s" in limits.reason_to_skip(3.0)
    assert "budget" in Limits(rounds=3, deadline=0.0).reason_to_skip(None)
    assert [limits.rounds_of(round_s) for round_s in (0.0, 2.0, 100.0)] == [9, 5, 3]


def test_a_spent_budget_leaves_everything_out_and_says_so(tmp_path: Path) -> None:
    assert run(tmp_path / "bench", "--mechanisms", "dense", "--budget-s", "0") == []
    left_out = (tmp_path / "bench.md").read_text().split("## Left out")[1]
    assert left_out.count("the time budget is used up") == 6


@pytest.mark.parametrize("baseline", baselines_on(torch.device("cuda")), ids=lambda baseline: baseline.name)
def test_baselines_refuse_what_they_do_not_compute(baseline: Contender) -> None:
    with pytest.raises(ConfigError, match=baseline.name):
        baseline.plan(MoBA(), Rows.packed([64]), SHAPE)
    if not baseline.packed:
        with pytest.raises(ConfigError, match="one document only"):
            baseline.plan(Dense(), Rows.packed([32, 32]), SHAPE)


def test_a_case_that_cannot_be_planned_is_left_out_with_its_reason() -> None:
    bench = AttentionBench(SHAPE)
    (spans,) = [case for case in find_cases(["spans"], []) if case.name == "spans"]
    with connected(Ranks(), SHAPE.device):
        assert bench.check_all([AttentionRow(Ours("cpu"), spans)]) == {}
    assert "8 windows for 2 query heads" in bench.left_out["spans by cpu"]


def test_a_check_of_one_document_is_not_compared_with_packed_documents() -> None:
    """Both have the same text: the first contender computes packed documents, the second does not."""
    dense, bench = find_cases(["dense"], [])[0], AttentionBench(SHAPE)
    with connected(Ranks(), SHAPE.device):
        checked = bench.check_all(AttentionRow(contender, dense) for contender in (Ours("cpu"), *baselines_on(CPU)))
    assert [verdict.correct for _, verdict in checked.values()] == [True, True]


def test_a_row_is_started_and_measured_where_its_work_takes_less_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """48 s of 256 tokens, four times the 12 s of 128 tokens, which were 3 s of 64 tokens."""

    def start(self: AttentionBench, row: AttentionRow, size: int) -> Pass:
        return lambda: (1e3 * (size / 64) ** 2, 2e3 * (size / 64) ** 2)

    monkeypatch.setattr(AttentionBench, "start", start)
    monkeypatch.setattr(AttentionBench, "work", lambda self, row, size: size**2)
    monkeypatch.setattr(AttentionBench, "needs", lambda self, row, size: {"fwd": size})
    monkeypatch.setattr(AttentionBench, "records", lambda self, result: [])
    bench, row = AttentionBench(SHAPE), AttentionRow(Ours("cpu"), find_cases(["dense"], [])[0])
    checked = {row.name: (row, Verdict(True, ""))}
    bench.measure(checked, [256, 64, 128], Limits(rounds=3, row_s=20.0))
    bench.measure(checked, [64], Limits(rounds=3, row_s=2.0))
    # How long the first size takes is not known before; memory would take another such pass.
    assert [(found.size, found.ms("bwd"), found.ms("fwd_bwd"), found.needs) for found in bench.results] == [
        (64, 2e3, 3e3, {"fwd": 64}), (128, 8e3, 12e3, {"fwd": 128}), (64, 2e3, 3e3, None),
    ]  # fmt: skip
    reason = "a forward and backward pass would take 48 s, over the limit of 20 s"
    assert bench.left_out == {"dense by cpu, 256 tokens": reason}


@pytest.mark.parametrize(
    ("forward", "kept", "backward", "both"), [(80, 60, 90, 150), (80, 5, 40, 80)], ids=["backward", "forward"]
)
def test_the_peak_of_a_pass_counts_what_forward_left(
    monkeypatch: pytest.MonkeyPatch, forward: int, kept: int, backward: int, both: int
) -> None:
    before = 1000
    starts, peaks = iter((before, before + kept)), iter((before + forward, before + kept + backward))
    monkeypatch.setattr(bench_run, "reset_peak", lambda device: next(starts))
    monkeypatch.setattr(bench_run, "peak", lambda device: next(peaks))
    x = torch.ones(3, requires_grad=True)
    found = bench_run.peaks_of_pass(lambda x: 2 * x, [x], torch.ones(3))
    assert found in (None, {"fwd": forward, "bwd": backward, "fwd_bwd": both})
    assert found is not None or not bench_run.STATUS.exists()


def test_a_row_that_dies_in_a_round_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def start(self: AttentionBench, row: AttentionRow, size: int) -> Pass:
        def run() -> tuple[float, float]:
            if row.contender.name != "cpu" and next(calls) == 1:
                raise RuntimeError("out of memory\nsee above")
            return 1.0, 2.0

        return run

    monkeypatch.setattr(AttentionBench, "start", start)
    bench, dense = AttentionBench(SHAPE), find_cases(["dense"], [])[0]
    rows = [AttentionRow(contender, dense) for contender in (Ours("cpu"), *baselines_on(CPU))]
    bench.measure({row.name: (row, Verdict(True, "")) for row in rows}, [64], Limits(rounds=3))
    assert [result.row.name for result in bench.results] == ["dense by cpu"]
    assert bench.left_out == {"dense by torch_sdpa, 64 tokens": "RuntimeError: out of memory"}
