"""A mechanism in one file, tests/support/toy_mechanism.py, takes part in the contract, the matrix and the benchmark
with no other edit.

Each in a process of its own: in this one there is no toy.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from tests.parallel.test_matrix import DEGREES
from tests.support import oracle

ROOT = Path(__file__).resolve().parents[1]
CONTRACT, MATRIX = "tests/kernels/test_sequence_attention.py", "tests/parallel/test_matrix.py"


def python(*arguments: str) -> str:
    """Run Python in the repository's root and return what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_with_toy(*arguments: str) -> str:
    return python("-m", "pytest", "-p", "tests.support.toy_mechanism", "-p", "no:cacheprovider", "-q", *arguments)


def test_there_is_no_toy_without_its_file() -> None:
    assert "toy" not in MECHANISMS.load()


def test_contract_and_matrix_find_it() -> None:
    found = pytest_with_toy("--collect-only", CONTRACT, MATRIX, "-k", "toy").splitlines()
    able = [
        name for name, backend in BACKENDS.load().items() if backend.unavailable_reason(torch.device("cpu")) is None
    ]
    for backend in able:
        for dtype in oracle.RELATIVE_TOLERANCE:
            assert f"{CONTRACT}::test_mechanism_equals_the_formula[Toy(reach=5)-{backend}-{dtype}]" in found
    for strategy in STRATEGIES:
        for degree in DEGREES:
            assert f"{MATRIX}::test_equals_one_process[{strategy}-{degree}-toy]" in found


@pytest.mark.parametrize(
    "case",
    [
        f"{CONTRACT}::test_mechanism_equals_the_formula[Toy(reach=5)-cpu-torch.float64]",
        f"{MATRIX}::test_equals_one_process[ring-2-toy]",
    ],
)
def test_it_passes(case: str) -> None:
    """The ranks of the matrix are processes that know of the toy only by the instances that they are handed."""
    assert "1 passed" in pytest_with_toy(case)


def test_the_benchmark_has_its_row(tmp_path: Path) -> None:
    command = (
        "import sys, tests.support.toy_mechanism; from farspan.tools.bench_attention import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    shape = ["--heads", "2:1", "--head-dim", "8", "--tokens", "128"]
    python("-c", command, "--mechanisms", "toy", "--varlen", "toy_5", *shape, "--out", str(tmp_path / "bench"))
    records = json.loads((tmp_path / "bench.json").read_text())
    measured = {record["mechanism"]: record for record in records if record["direction"] == "fwd_bwd"}
    assert set(measured) == {"dense", "toy_5", "toy_5_varlen"}
    assert all(record["correct"] and record["ms"] > 0 for record in measured.values())
