"""The GPU's checks, on a CPU: their order, their verdicts, their exit status."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.backend import BACKENDS
from farspan.kernels.cuda import varlen
from farspan.kernels.mechanism import MECHANISMS, Heads
from farspan.kernels.mechanisms.window import Window
from farspan.kernels.moe import grouped_loop
from farspan.kernels.planning.varlen import VarlenSequence
from farspan.parallel.ranks import Ranks, connected
from farspan.tools import bench_experts, gpu_checks
from farspan.tools.bench.case import Shape
from farspan.tools.bench.check import check_rows
from farspan.tools.bench.contenders import Ours
from tests.tools.test_bench_attention import WRONG, ChangedBackend

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "DTYPES", [torch.bfloat16, torch.float32])
    monkeypatch.setattr(gpu_checks, "HEADS", [Heads(query=4, kv=2)])
    monkeypatch.setattr(gpu_checks, "HEAD_SIZES", [(16, 16), (24, 16)])
    monkeypatch.setattr(bench_experts, "CHECKED_SIZES", [(16, 8)])
    monkeypatch.setattr(bench_experts, "CHECKED_COUNTS", {"some": (3, 0, 5), "none": (0, 0)})


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return the exit status of the checks on a CPU, and what they print."""
    return gpu_checks.main(["--device", "cpu", *arguments]), capsys.readouterr().out


def test_one_thing_changes_at_a_time_before_all_do() -> None:
    found = gpu_checks.shapes(CPU)
    assert len(found) == len(set(found)) == 3 * 3 * 4
    assert (found[0].dtype, found[0].heads.kv, found[0].head_dim) == (torch.bfloat16, 2, 128)
    differences = [
        (s.dtype != torch.bfloat16) + (s.heads.kv != 2) + ((s.head_dim, s.value_dim) != (128, 128)) for s in found
    ]
    assert differences == sorted(differences)
    # Another dtype is the first of the differences.
    assert [s.dtype for s in found[1:3]] == [torch.float16, torch.float32]
    assert {(s.head_dim, s.value_dim) for s in found} == {(128, 128), (64, 64), (192, 128), (256, 256)}


def test_every_example_meets_every_shape_over_one_document_and_several(small: None) -> None:
    examples = Window.examples()
    found = list(gpu_checks.checks(examples, [Ours("cpu")], CPU, 64))
    assert len(found) == 4 * 2 * len(examples)
    assert [check.mechanism for _, check in found[: len(examples)]] == list(examples)
    assert {bool((check.rows.document > 0).any()) for _, check in found} == {True, False}


@pytest.fixture(autouse=True)
def shapes_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks make another counter."""
    monkeypatch.setattr(varlen, "SHAPES", varlen.SHAPES)


def test_right_ones_pass(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--mechanisms", "window", "--tokens", "64") == (
        0,
        "24 checks of cpu are correct\n3 checks of cpu, the same bits twice, are correct\n"
        "12 checks of products of experts are correct\n"
        "0 are wrong, 0 were left out as the time budget was used up\n",
    )
    # cuDNN is checked over one document, and packed documents are left to FlashAttention.
    assert varlen.SHAPES.is_worth(VarlenSequence(0, 64, 0, 64, causal=True))
    assert not varlen.SHAPES.is_worth(VarlenSequence(0, 32, 0, 32, causal=True))


@pytest.mark.parametrize("name", ["moba", "vmoba", "sparge", "vggt", "mosa", "nats"])
def test_choices_are_compared_with_the_cpu(
    small: None, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is chosen on the device is changed behind its back: one block or token instead of another."""
    example = MECHANISMS.get(name).examples()[0]
    shape, rows = gpu_checks.shapes(CPU)[0], check_rows(300, packed=True)
    verdict = gpu_checks.same_choice(example, rows, shape)
    assert verdict is not None
    assert verdict.correct
    right, calls = gpu_checks._choice, itertools.count()

    def change_every_second(*arguments: object) -> list[torch.Tensor] | None:
        found = right(*arguments)  # pyright: ignore[reportArgumentType]
        if found and next(calls) % 2:
            found[-1].flatten()[5] = ~found[-1].flatten()[5]
        return found

    monkeypatch.setattr(gpu_checks, "_choice", change_every_second)
    status, printed = run(capsys, "--mechanisms", name, "--tokens", "300", "--budget-s", "-1")
    assert status == gpu_checks.WRONG
    assert "chooses otherwise than on the CPU, numbers random" in printed


def test_other_bits_the_second_time_are_wrong(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS._parts, "moody", ChangedBackend(lambda _, dk: dk[-10].mul_(1 + 1e-5 * torch.rand(()))))
    monkeypatch.setattr(gpu_checks, "DTYPES", [torch.float32])
    status, printed = run(capsys, "--mechanisms", "dense", "--backends", "moody", "--tokens", "64")
    assert status == gpu_checks.WRONG
    assert "other bits the second time" in printed


def test_far_rows_are_compared_with_the_same_rows_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(heads=Heads(query=4, kv=2), head_dim=16, value_dim=8, dtype=torch.bfloat16, device=CPU)
    monkeypatch.setitem(BACKENDS._parts, "wrong", ChangedBackend(lambda _, dk: dk[-10].mul_(2)))
    with connected(Ranks(), CPU):
        right, wrong = (gpu_checks.far_rows(Ours(name), shape, 2000) for name in ("cpu", "wrong"))
    assert right.correct, right.message
    assert right.message == "the last of 2000 rows, 128000 numbers: correct"
    assert "dk has error" in wrong.message


def test_wrong_ones_are_named_and_fail(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS._parts, "wrong", WRONG)
    status, printed = run(capsys, "--mechanisms", "dense", "--backends", "cpu,wrong", "--tokens", "64")
    assert status == gpu_checks.WRONG == 1
    assert "WRONG: wrong, torch.bfloat16, D=16:16: Dense(causal=True), 64 tokens, 4:2 heads" in printed
    assert "16 checks of cpu are correct" in printed
    assert "WRONG: cpu" not in printed


def test_a_spent_budget_is_reported(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    """And so is what was never checked at all, which is no success."""
    status, printed = run(capsys, "--mechanisms", "window", "--budget-s", "-1")
    assert status == gpu_checks.INCOMPLETE
    assert "NOT CHECKED at all: Window(window=7, sinks=0, causal=True) by cpu in bfloat16" in printed
    assert "causal=True) by cpu in float32" in printed
    assert "0 are wrong, 24 were left out as the time budget was used up" in printed


@pytest.mark.parametrize("name", ["swiglu_backward", "swiglu"])
def test_wrong_products_of_experts_fail(
    small: None, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient, or a result, that is 3 % too large."""
    right = getattr(grouped_loop, name)

    def rounded(*arguments: Any) -> Any:
        found = right(*arguments)
        return 1.03 * found if isinstance(found, Tensor) else (found[0], 1.03 * found[1], *found[2:])

    monkeypatch.setattr(grouped_loop, name, rounded)
    status, printed = run(capsys, "--mechanisms", "dense", "--backends", "cpu", "--budget-s", "-1")
    assert status == gpu_checks.WRONG
    wrong = "out" if name == "swiglu" else "dgate"
    assert f"WRONG: products of experts: some, 8 rows, 16 x 8, torch.float32: {wrong} has error" in printed
    assert "WRONG: products of experts: none" not in printed
