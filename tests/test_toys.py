"""A mechanism and a kind, each in one file of tests/support, take part in the contract, the matrix, the planner and the
benchmark with no other edit.

In processes of their own: in this one there is no toy.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanism import MECHANISMS
from farspan.parallel.context_parallel.strategy import STRATEGIES
from farspan.units import BYTES
from tests.support import oracle
from tests.support.matrix import DEGREES

ROOT = Path(__file__).resolve().parents[1]
CONTRACT, MATRIX = "tests/kernels/test_sequence_attention.py", "tests/parallel/matrix"


class Toy(NamedTuple):
    """benchmark: the name of its case."""

    module: str
    examples: tuple[str, ...]
    benchmark: str


UNITS = {unit: scale for scale, unit in BYTES}
GATED = ("WindowAndBlocks(window=5, block=16, sparsity=0)", "WindowAndBlocks(window=9, block=16, sparsity=4)")
TOYS = {
    "toy": Toy("tests.support.toy_mechanism", ("Toy(reach=5)",), "toy_5"),
    "gated": Toy("tests.support.toy_kind", GATED, "gated_5x16"),
}


def python(*arguments: str) -> str:
    """Run Python in the repository's root and return what it printed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pytest_with_toys(*arguments: str) -> str:
    plugins = [argument for toy in TOYS.values() for argument in ("-p", toy.module)]
    return python("-m", "pytest", *plugins, "-p", "no:cacheprovider", "-q", *arguments)


def commands_with_toys(module: str, *commands: list[str]) -> list[str]:
    """Call `main` of a module with the arguments of each command; return what each printed."""
    toys, end = ", ".join(toy.module for toy in TOYS.values()), "--- end of a command"
    lines = (
        f"import json, sys, {toys}",
        f"from {module} import main",
        "for arguments in json.loads(sys.argv[1]):",
        "    if status := main(arguments): sys.exit(status)",
        f"    print({end!r}, flush=True)",
    )
    return python("-c", "\n".join(lines), json.dumps(commands)).split(end)[:-1]


def test_there_is_no_toy_without_its_file() -> None:
    assert not TOYS.keys() & MECHANISMS.load().keys()


def test_contract_and_matrix_find_them() -> None:
    names = {example.partition("(")[0] for toy in TOYS.values() for example in toy.examples}
    found = pytest_with_toys("--collect-only", CONTRACT, MATRIX, "-k", " or ".join([*TOYS, *names])).splitlines()
    able = [name for name, x in BACKENDS.load().items() if x.unavailable_reason(torch.device("cpu")) is None]
    for toy, (_, examples, _) in TOYS.items():
        for example in examples:
            for backend in able:
                for dtype in oracle.RELATIVE_TOLERANCE:
                    assert f"{CONTRACT}::test_mechanism_equals_the_formula[{example}-{backend}-{dtype}]" in found
        for strategy in STRATEGIES:
            for degree in DEGREES:
                case = f"test_equals_one_process[{strategy}-{degree}-{toy}]"
                assert sum(line.startswith(MATRIX) and line.endswith(f"::{case}") for line in found) == 1, case


def test_they_pass() -> None:
    """In one process, as most of the time goes into starting Python and the ranks.

    The mechanism: the ranks of the matrix are processes that know of it only by the instances that they are handed. The
    kind: out and the gradients of q, k, v and routing in all dtypes, a part of the heads, what is hidden; and under
    strategies, with bytes by formula. `ship` and `state` refuse it.
    """
    low, high = f"{MATRIX}/test_1_and_2_ranks.py", f"{MATRIX}/test_4_ranks.py"
    cases = [f"{CONTRACT}::test_mechanism_equals_the_formula[Toy(reach=5)-cpu-torch.float64]"]
    cases += [f"{low}::test_equals_one_process[ring-2-toy]"]
    for backend in ("cpu", "reference"):
        for example in GATED:
            dtypes = list(oracle.RELATIVE_TOLERANCE)
            cases += [f"{CONTRACT}::test_mechanism_equals_the_formula[{example}-{backend}-{dtype}]" for dtype in dtypes]
            cases += [f"{CONTRACT}::test_some_heads_equal_a_slice_of_all[{example}-{backend}]"]
            cases += [f"{CONTRACT}::test_nothing_leaks_from_hidden_tokens[{example}-{backend}]"]
    pairs = ["ring-1", "ring-2", "gather-2", "single-1", "ship-2", "state-2"]
    cases += [f"{low}::test_equals_one_process[{pair}-gated]" for pair in pairs]
    cases += [f"{high}::test_equals_one_process[{pair}-gated]" for pair in ("fetch-4", "ulysses-4", "hybrid-4")]
    of_accesses = f"{MATRIX}/test_unsupported.py::test_accesses_decide_what_a_strategy_takes"
    cases += [f"{of_accesses}[{name}]" for name in ("ring", "ship", "state")]
    assert f"{len(cases)} passed" in pytest_with_toys(*cases)


def test_the_planner_takes_it(tmp_path: Path) -> None:
    """The cost model picks a strategy that serves it; bytes and memory count both branches and the router."""

    def dry_run(mechanism: str, strategy: str) -> list[str]:
        options = ["--ranks=4", "data.sequence_tokens=16384", "parallel.context=4", f"parallel.strategy={strategy}"]
        options += [f"attention.mechanism={mechanism}", "attention.backend=cpu", f"data.folder={tmp_path / 'none'}"]
        return ["train", "configs/demo.toml", "--dry-run", *options]

    def num_bytes(pattern: str, text: str) -> float:
        found = re.search(rf"{pattern} *([\d.,]+) (\w+)", text)
        assert found, text
        return float(found[1].replace(",", "")) * UNITS[found[2]]

    runs = dry_run("gated", "auto"), dry_run("gated", "ring"), dry_run("dense", "ring")
    chosen, gated, dense = commands_with_toys("farspan.launch.cli", *runs)
    assert TOYS["gated"].examples[0] in chosen
    offered = set(re.findall(r"(\w+): [\d,.]+ ms", chosen))
    assert "ring" in offered
    assert not offered & {"ship", "state", "single"}
    sent = {name: num_bytes("traffic", text) for name, text in (("gated", gated), ("dense", dense))}
    # Each branch has a ring of its own, and MoBA's means of 1,024 blocks are summed over all ranks.
    means = 2 * 3 / 4 * 1024 * 2 * 32 * 8  # KV heads, D, bytes; in two layers
    assert sent["gated"] == pytest.approx(2 * sent["dense"] + 2 * means, rel=0.01)
    assert num_bytes("activations", gated) > num_bytes("activations", dense)


def test_the_benchmark_has_their_rows(tmp_path: Path) -> None:
    cases = [toy.benchmark for toy in TOYS.values()]
    shape = ["--heads", "2:1", "--head-dim", "8", "--tokens", "128"]
    named = ["--mechanisms", ",".join(TOYS), "--varlen", ",".join(cases)]
    commands_with_toys("farspan.tools.bench_attention", [*named, *shape, "--out", str(tmp_path / "bench")])
    records = json.loads((tmp_path / "bench.json").read_text())
    measured = {record["mechanism"]: record for record in records if record["direction"] == "fwd_bwd"}
    assert set(measured) == {"dense", *cases, *(f"{case}_varlen" for case in cases)}
    assert all(record["correct"] and record["ms"] > 0 for record in measured.values())
