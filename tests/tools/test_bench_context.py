"""The measurement of context parallelism at tiny sizes: what it writes, and that nothing wrong gets a number."""

import importlib.util
import json
import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytest
import torch

from farspan.kernels.mechanism import Heads, Mechanism
from farspan.kernels.mechanisms.dense import Dense
from farspan.kernels.mechanisms.lightning import Lightning
from farspan.kernels.mechanisms.moba import MoBA
from farspan.kernels.mechanisms.mosa import MoSA
from farspan.kernels.planner import HeadShare
from farspan.parallel.context_parallel.strategy import STRATEGIES, DistributedAttention, Strategy
from farspan.parallel.layout import Shards
from farspan.parallel.ranks import Ranks, connected
from farspan.tools.bench import on_rank
from farspan.tools.bench.baselines.context_parallel import context_baselines
from farspan.tools.bench.case import Case, Shape
from farspan.tools.bench.on_rank import ContextRow, StrategyContender, Worker, worker_pool
from farspan.tools.bench_context import ContextBench, main, predicted
from farspan.tools.rank_pool import RankError, RankPool

RECORDED = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "2026-11-28_amd_epyc_context_4k.json"
NUMBERS = ["tokens_per_s", "bytes_sent", "bytes_formula", "balance", "peak_bytes"]
SHAPE = Shape(heads=Heads(query=4, kv=2), head_dim=8, value_dim=8, dtype=torch.float32, device=torch.device("cpu"))


@final
class Wrong(Strategy):
    """Attends to all keys, whatever the mechanism."""

    @classmethod
    def unsupported_reason(cls, mechanism: Mechanism, heads: Heads, degree: int, inner: int = 1) -> str | None:
        return None

    def plan(self, mechanism: Mechanism, shards: Shards, share: HeadShare, *, backend: str) -> DistributedAttention:
        return STRATEGIES.get("gather")(self.channel).plan(Dense(causal=False), shards, share, backend=backend)


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with worker_pool(2, 1, "cpu") as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[RankPool]:
    with worker_pool(4, 1, "cpu") as pool:
        yield pool


def test_writes_records_tables_machine_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run with a strategy that was registered a moment ago and is wrong; tokens do not divide by the ranks."""
    monkeypatch.setitem(STRATEGIES._parts, "wrong", Wrong)
    out = tmp_path / "new" / "bench"
    chosen = ["--strategies", "ring,double_ring,wrong,torch_context_parallel", "--layouts", "zigzag"]
    size = ["--tokens", "301", "--degrees", "2", "--heads", "4:2", "--head-dim", "8"]
    assert main([*chosen, *size, "--mechanisms", "dense", "--out", str(out)]) == 0
    records: list[dict[str, Any]] = json.loads(out.with_suffix(".json").read_text())
    assert [list(record) for record in records] == [list(json.loads(RECORDED.read_text())[0])] * len(records)
    by_strategy = {record["strategy"]: record for record in records}
    assert set(by_strategy) - {"torch_context_parallel"} == {"single", "single_2_threads", "ring", "wrong"}
    assert all(by_strategy["wrong"][number] is None for number in NUMBERS)
    assert all(record["tokens"] == 301 for record in records)
    ring, single = by_strategy["ring"], by_strategy["single"]
    assert (ring["layout"], ring["mechanism"], ring["degree"], single["degree"]) == ("zigzag", "dense", 2, 1)
    chunk = 152 * 2 * (8 + 8) * 4  # tokens of a rank, padded to 4 chunks of 76, KV heads, D and Dv, bytes
    assert ring["bytes_sent"] == ring["bytes_formula"] == chunk + chunk + 2 * chunk
    assert single["bytes_sent"] == single["bytes_formula"] == 0
    assert 1 <= ring["balance"] < 1.1
    assert ring["tokens_per_s"] > 0
    check_files(tmp_path / "new")
    printed = capsys.readouterr().out
    assert "dense by wrong, zigzag, 2 ranks: NOT CORRECT: Dense(causal=True), 1024 tokens, 4:2 heads" in printed


def check_files(folder: Path) -> None:
    machine = json.loads((folder / "bench_machine.json").read_text())
    assert {"date", "commit", "command", "cpu", "threads", "torch", "deepspeed"} <= set(machine)
    assert "farspan.tools.bench_context" in machine["command"]
    text = (folder / "bench.md").read_text()
    assert "](bench.svg)" in text
    assert text.count("| wrong | zigzag | 2 | not correct |") == 1
    overlap = text.split("## Overlap, 2 ranks")[1].split("## What was checked")[0] if "## Overlap" in text else ""
    left_out = text.split("## Left out")[1]
    assert (overlap.count("| fwd |"), overlap.count("| bwd |")) == (4, 4) or "overlap, 2 ranks: it needs" in left_out
    assert "dense by double_ring, zigzag, 2 ranks: strategy 'double_ring' needs a grid of ranks" in left_out
    assert "torch_context_parallel, zigzag, 2 ranks" in text
    texts = {element.text for element in ElementTree.parse(folder / "bench.svg").iter()}
    assert {"ranks", "tokens/s", "ring, zigzag", "one rank, threads"} <= texts


def a_row(mechanism: Mechanism, strategy: str, degree: int, layout: str = "zigzag") -> ContextRow:
    case = Case(name=str(mechanism), mechanism=mechanism)
    return ContextRow(
        contender=StrategyContender(strategy, STRATEGIES.get(strategy)), case=case, layout=layout, degree=degree
    )


@pytest.mark.parametrize(
    ("strategy", "mechanism"),
    [
        ("double_ring", Dense()),
        ("hybrid", Dense()),
        ("fetch", MoBA(block=16, top_k=2)),
        ("ship", MoBA(block=16, top_k=2)),
        ("ring", MoSA(sparsity=4)),
        ("fetch", MoSA(sparsity=4)),
        ("state", Lightning()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_counted_bytes_are_those_of_the_formula(four: RankPool, strategy: str, mechanism: Mechanism) -> None:
    """Of the very inputs that are measured, where what is sent depends on them."""
    needs = four.run(on_rank.measure, a_row(mechanism, strategy, 4), 301, SHAPE)
    assert all(need["sent"] == need["formula"] for need in needs), needs
    assert all(need["sent"] and need["work"] > 0 for need in needs)


def test_work_is_uneven_where_ranks_have_contiguous_tokens(two: RankPool) -> None:
    contiguous, zigzag = (
        [need["work"] for need in two.run(on_rank.measure, a_row(Dense(), "ring", 2, layout), 256, SHAPE)]
        for layout in ("contiguous", "zigzag")
    )
    assert contiguous == [4 * 128 * 129 / 2, 4 * (256 * 257 - 128 * 129) / 2]
    assert zigzag[0] == zigzag[1]
    assert sum(zigzag) == sum(contiguous)


def test_only_supported_contenders_have_a_row() -> None:
    contenders = [StrategyContender(name, strategy) for name, strategy in STRATEGIES.load().items() if name != "single"]
    bench = ContextBench(SHAPE)
    rows = bench.rows(Case(name="lightning", mechanism=Lightning()), contenders, ["zigzag"], [2, 4])
    assert [(row.strategy, row.degree) for row in rows] == [
        ("single", 1), ("single_2_threads", 1), ("single_4_threads", 1), ("state", 2), ("ulysses", 2), ("hybrid", 4),
        ("hybrid_outer", 4), ("state", 4), ("ulysses", 4),
    ]  # fmt: skip
    assert "'state'" in bench.left_out["lightning by ring, zigzag, 2 ranks"]


def move_delayed(worker: Worker, delay_s: float) -> tuple[float, float, float, bool]:
    """On each of two ranks, the second later by half a delay: return the moments, by the clock that both share, at
    which it began, went on and had what the other sent; and whether all is right, and only the message counted.
    """
    channel, rank = worker.channel(1), worker.ranks.rank
    worker.delay_transfers(delay_s)
    worker.align()
    time.sleep(delay_s / 2 * rank)
    begun = time.monotonic()
    transfer = channel.shift(torch.full((3,), float(rank)), kind="shift", tag=1)
    went_on = time.monotonic()
    right = transfer.wait().tolist() == [1.0 - rank] * 3 and worker.traffic.take().sent == {"shift": 12}
    return begun, went_on, time.monotonic(), right


@pytest.mark.parametrize("delay_s", [0.0, 0.4])
def test_delayed_transfers_do_not_block_their_senders(two: RankPool, delay_s: float) -> None:
    """However early the reader began, a transfer completes a delay after its sender began."""
    (begun, went_on, done, right), (second_begun, _, second_done, right_too) = two.run(move_delayed, delay_s)
    assert right
    assert right_too
    assert done >= second_begun + delay_s
    assert second_done >= begun + delay_s
    assert not delay_s or went_on < begun + delay_s


def test_what_overlap_should_take() -> None:
    """Two ranks, steps of 10 ms: one hop between two steps; backward one more, with nothing left to compute."""
    assert predicted(2, "fwd", 10.0, 0.0) == (20.0, 20.0)
    assert predicted(2, "fwd", 10.0, 10.0) == (20.0, 30.0)
    assert predicted(2, "fwd", 10.0, 25.0) == (35.0, 45.0)
    assert predicted(4, "fwd", 10.0, 10.0) == (40.0, 70.0)
    assert predicted(4, "bwd", 10.0, 10.0) == (50.0, 80.0)


def test_ranks_are_compared_with_one_rank_of_as_many_threads() -> None:
    bench = ContextBench(SHAPE)
    row, single = a_row(Dense(), "ring", 2), a_row(Dense(), "single", 1)
    assert bench.is_baseline(replace(single, threads=2), row)
    assert not bench.is_baseline(single, row)
    assert not bench.is_baseline(replace(single, threads=2), replace(single, threads=2))


def fail(worker: Worker, rank: int) -> int:
    if worker.ranks.rank == rank:
        raise ValueError("one rank\nhas had enough")
    worker.align()
    return worker.ranks.rank


def die(worker: Worker) -> None:
    os._exit(1)


def test_a_failed_world_says_why_and_is_started_again(two: RankPool) -> None:
    with pytest.raises(RankError, match="has had enough") as failure:
        two.run(fail, 1)
    assert failure.value.summary == "has had enough"
    assert two.run(fail, -1) == [0, 1]
    with pytest.raises(RankError, match="the process died"):
        two.run(die)
    assert two.run(fail, -1) == [0, 1]


def test_a_rank_that_does_not_answer_in_time_is_reported() -> None:
    with worker_pool(1, 1, "cpu") as pool:
        assert pool.run(fail, -1) == [0]
        pool.timeout_s = 0.2
        with pytest.raises(RankError, match="no answer"):
            pool.run(sleep)


def sleep(worker: Worker) -> None:
    time.sleep(60)


def test_fewer_gpus_than_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["--device", "cuda", "--degrees", "2,4"]) == 2
    assert "error: --degrees 4 needs as many GPUs with --device cuda, and there are 2" in capsys.readouterr().err


def test_baselines_refuse_what_they_do_not_compute() -> None:
    of_torch, of_deepspeed = (context_baselines()[name] for name in ("torch_context_parallel", "deepspeed_ulysses"))
    assert of_torch.unsupported_reason(Dense(), "zigzag", SHAPE.heads, 2) is None
    assert "zigzag" in str(of_torch.unsupported_reason(Dense(), "contiguous", SHAPE.heads, 2))
    assert "dense causal" in str(of_torch.unsupported_reason(MoBA(), "zigzag", SHAPE.heads, 2))
    assert of_deepspeed.unsupported_reason(Dense(), "zigzag", SHAPE.heads, 2) is not None


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_is_called_as_it_wants_to_be(two: RankPool) -> None:
    baseline, case = context_baselines()["deepspeed_ulysses"], Case(name="lightning", mechanism=Lightning())
    row = ContextRow(contender=baseline, case=case, layout="contiguous", degree=2)
    assert "KV heads" in str(baseline.unsupported_reason(Dense(), "contiguous", SHAPE.heads, 4))
    bench = ContextBench(SHAPE)
    with connected(Ranks(), SHAPE.device), bench.pools:
        assert bench.check(row).correct
    sent = {need["sent"] for need in two.run(on_rank.measure, row, 256, SHAPE)}
    assert sent == {2 * 128 * (4 + 2 + 2 + 4) * 8 * 4 // 2}, "half of q, k, v and out, each way"
