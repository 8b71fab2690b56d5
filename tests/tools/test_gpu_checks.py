"""The GPU's checks, on a CPU: their order, their verdicts, their exit status."""

import pytest
import torch

from farspan.kernels.backend import BACKENDS
from farspan.kernels.mechanism import Heads
from farspan.kernels.mechanisms.window import Window
from farspan.tools import gpu_checks
from farspan.tools.bench.case import Ours
from tests.tools.test_bench_attention import WrongBackend

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "DTYPES", [torch.bfloat16, torch.float32])
    monkeypatch.setattr(gpu_checks, "HEADS", [Heads(query=4, kv=2)])
    monkeypatch.setattr(gpu_checks, "HEAD_SIZES", [(16, 16), (24, 16)])


def test_one_thing_changes_at_a_time_before_all_do() -> None:
    found = gpu_checks.shapes(CPU)
    assert len(found) == len(set(found)) == 3 * 3 * 4
    assert (found[0].dtype, found[0].heads.kv, found[0].head_dim) == (torch.bfloat16, 2, 128)
    differences = [
        (s.dtype != torch.bfloat16) + (s.heads.kv != 2) + ((s.head_dim, s.value_dim) != (128, 128)) for s in found
    ]
    assert differences == sorted(differences)
    assert {(s.head_dim, s.value_dim) for s in found} == {(128, 128), (64, 64), (192, 128), (256, 256)}


def test_every_example_meets_every_shape_over_one_document_and_several(small: None) -> None:
    examples = Window.examples()
    found = list(gpu_checks.checks(examples, [Ours("cpu")], CPU, 64))
    assert len(found) == 4 * 2 * len(examples)
    assert [check.mechanism for _, check in found[: len(examples)]] == list(examples)
    assert {bool((check.rows.document > 0).any()) for _, check in found} == {True, False}


def test_right_ones_pass(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main(["--device", "cpu", "--mechanisms", "window", "--tokens", "64"]) == 0
    assert capsys.readouterr().out == (
        "24 checks of cpu are correct\n0 are wrong, 0 were left out as the time budget was used up\n"
    )


def test_wrong_ones_are_named_and_fail(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS._parts, "wrong", WrongBackend())
    arguments = ["--device", "cpu", "--mechanisms", "dense", "--backends", "cpu,wrong", "--tokens", "64"]
    assert gpu_checks.main(arguments) == 1
    said = capsys.readouterr().out
    assert "WRONG: wrong, torch.bfloat16, D=16:16: Dense(causal=True), 64 tokens, 4:2 heads" in said
    assert "16 checks of cpu are correct" in said
    assert "WRONG: cpu" not in said


def test_a_spent_budget_is_told(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main(["--device", "cpu", "--mechanisms", "window", "--budget-s", "-1"]) == 0
    assert "0 are wrong, 24 were left out as the time budget was used up" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main([]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda needs a CUDA GPU")
