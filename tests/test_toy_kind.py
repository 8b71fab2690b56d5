"""A kind of mechanism in one file, tests/support/toy_kind.py, takes part in the contract, the matrix, the planner and
the benchmark with no other edit.

Each in a process of its own: in this one there is no toy.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.parallel.test_matrix import DEGREES
from tests.support import oracle
from tests.test_toy_mechanism import MATRIX, python

TOY = "tests.support.toy_kind"
SEQUENCE = "tests/kernels/test_sequence_attention.py"
EXAMPLES = ("WindowAndBlocks(window=5, block=16, sparsity=0)", "WindowAndBlocks(window=9, block=16, sparsity=4)")


def pytest_with_toy(*arguments: str) -> str:
    return python("-m", "pytest", "-p", TOY, "-p", "no:cacheprovider", "-q", *arguments)


def command_with_toy(module: str, *arguments: str) -> str:
    code = f"import sys, {TOY}; from {module} import main; sys.exit(main(sys.argv[1:]))"
    return python("-c", code, *arguments)


def test_there_is_no_toy_without_its_file() -> None:
    assert "gated" not in MECHANISMS.load()


def test_contract_and_matrix_find_it() -> None:
    found = pytest_with_toy("--collect-only", SEQUENCE, MATRIX, "-k", "gated or WindowAndBlocks").splitlines()
    able = [name for name, x in BACKENDS.load().items() if x.unavailable_reason(torch.device("cpu")) is None]
    for example in EXAMPLES:
        for backend in able:
            for dtype in oracle.RELATIVE_TOLERANCE:
                assert f"{SEQUENCE}::test_equals_the_formula[{example}-{backend}-{dtype}]" in found
    for strategy in STRATEGIES:
        for degree in DEGREES:
            assert f"{MATRIX}::test_equals_one_process[{strategy}-{degree}-gated]" in found


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_computes_its_definition(backend: str) -> None:
    """Out and the gradients of q, k, v and routing, in all dtypes; and a part of the heads does what it does in all."""
    chosen = f"(WindowAndBlocks and {backend}) and (formula or sharded or leaks)"
    assert "10 passed" in pytest_with_toy(SEQUENCE, "-k", chosen)


def test_it_equals_one_process_under_strategies() -> None:
    """Out, the gradients of q, k, v and routing, and the bytes by formula; `ship` and `state` refuse it."""
    pairs = ["ring-1", "ring-2", "fetch-4", "gather-2", "ulysses-4", "hybrid-4", "single-1", "ship-2", "state-2"]
    cases = [f"{MATRIX}::test_equals_one_process[{pair}-gated]" for pair in pairs]
    accesses = [f"{MATRIX}::test_accesses_decide_what_a_strategy_takes[{name}]" for name in ("ring", "ship", "state")]
    assert f"{len(pairs) + len(accesses)} passed" in pytest_with_toy(*cases, *accesses)


def test_the_planner_takes_it(tmp_path: Path) -> None:
    """The cost model picks a strategy that serves it; bytes and memory count both branches and the router."""

    def dry_run(mechanism: str, strategy: str) -> str:
        options = ["data.sequence_tokens=16384", "parallel.context=4", f"parallel.strategy={strategy}"]
        options += [f"attention.mechanism={mechanism}", "attention.backend=cpu", f"data.folder={tmp_path / 'none'}"]
        return command_with_toy("farspan.launch.cli", "train", "configs/demo.toml", "--dry-run", "--ranks=4", *options)

    def number(pattern: str, text: str) -> float:
        found = re.search(pattern, text)
        assert found, text
        return float(found[1].replace(",", ""))

    chosen = dry_run("gated", "auto")
    assert EXAMPLES[0] in chosen
    offered = set(re.findall(r"(\w+): [\d,.]+ ms", chosen))
    assert "ring" in offered
    assert not offered & {"ship", "state", "single"}
    gated, dense = (dry_run(mechanism, "ring") for mechanism in ("gated", "dense"))
    sent, activations = r"each rank sends ([\d.,]+) MiB", r"activations ([\d.]+)"
    # Each branch has a ring of its own, and MoBA's means of 1,024 blocks are summed over all ranks.
    means = 2 * 3 / 4 * 1024 * 2 * 32 * 8 / 2**20  # KV heads, D, bytes; in two layers
    assert number(sent, gated) == pytest.approx(2 * number(sent, dense) + 2 * means, abs=0.2)
    assert number(activations, gated) > number(activations, dense)


def test_the_benchmark_has_its_row(tmp_path: Path) -> None:
    shape = ["--heads", "2:1", "--head-dim", "8", "--tokens", "128"]
    named = ["--mechanisms", "gated", "--varlen", "gated_5x16"]
    command_with_toy("farspan.tools.bench_attention", *named, *shape, "--out", str(tmp_path / "bench"))
    records = json.loads((tmp_path / "bench.json").read_text())
    measured = {record["mechanism"]: record for record in records if record["direction"] == "fwd_bwd"}
    assert set(measured) == {"dense", "gated_5x16", "gated_5x16_varlen"}
    assert all(record["correct"] and record["ms"] > 0 for record in measured.values())
