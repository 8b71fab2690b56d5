"""farspan's attention in Megatron-Core's `GPTModel`: losses and gradients under CP, TP and EP are those of one process.

What they are compared with has no farspan in it: Megatron's own attention, or MoBA from its definition, sequence by
sequence in one process. Everything is float64, where Megatron's rotary angles, float32, are the same in both.
"""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.errors import ConfigError
from tests.support.megatron.cases import CASES, CHECKS, Case

# Newer Megatron-Core imports triton, and is for Python 3.12 and later.
NEEDED = ("megatron", "einops", "psutil", *(["triton"] if sys.version_info >= (3, 12) else []))
MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_megatron = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed")
RTOL, ATOL = 1e-12, 1e-13
"""Of float64 sums in another order; gradients are of the order of 1, and 1e-15 apart."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Any]:
    """What each case and check led to: a program of its own imports Megatron once, for its four ranks."""
    out = tmp_path_factory.mktemp("megatron") / "results.pt"
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.megatron.program", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert out.exists(), done.stderr
    return torch.load(out)


@needs_megatron
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_is_that_of_one_process(outcomes: dict[tuple[str, bool], Any], case: Case) -> None:
    found, truth = outcomes[case.name, False], outcomes[case.alone.name, True]
    assert not isinstance(truth, str), truth
    assert not isinstance(found, str), found
    assert found["gradients"].keys() == truth["gradients"].keys()
    for key in ("loss", "norm", "gradients"):
        torch.testing.assert_close(found[key], truth[key], rtol=RTOL, atol=ATOL)
    assert found["calls"] == 1 + bool(case.recompute)
    strategies = {kind.split("_")[0] for kind in found["sent"]}
    assert bool(strategies) == (case.cp > 1 and not case.hybrid)
    assert not strategies or case.strategy in ("auto", *strategies)


@needs_megatron
@pytest.mark.parametrize("check", CHECKS)
def test_layers_keep_the_rule(outcomes: dict[tuple[str, bool], Any], check: str) -> None:
    assert outcomes[check, False] is None, outcomes[check, False]


def test_megatron_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "farspan.integrations.megatron", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'farspan\[megatron\]'"):
        import_module("farspan.integrations.megatron")
