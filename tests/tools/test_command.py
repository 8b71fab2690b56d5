"""Command lines of the tools: unknown names, options and devices are refused in a sentence."""

import re
from types import ModuleType

import pytest
import torch

from farspan.tools import bench_attention, bench_checkpoint, bench_context, bench_experts, gpu_checks
from farspan.tools.command import human, sizes


def test_sizes_are_read_and_written_in_powers_of_1024() -> None:
    assert sizes("100,8K, 16k,1M") == [100, 8192, 16384, 1 << 20]
    assert [human(tokens) for tokens in (100, 8192, 1 << 20, 1025)] == ["100", "8K", "1M", "1025"]


@pytest.mark.parametrize(
    ("tool", "option", "name", "message"),
    [
        (bench_attention, "--mechanisms", "dens", "mechanism 'dens' does not exist.* Did you mean 'dense'"),
        (bench_attention, "--mechanisms", "moba_512x9", "Did you mean 'moba_512x8'"),
        (bench_attention, "--varlen", "nothing", "mechanism 'nothing' does not exist"),
        (bench_attention, "--backends", "cpuu", "attention backend 'cpuu' does not exist.* Did you mean 'cpu'"),
        (bench_context, "--strategies", "rin", "strategy 'rin' does not exist.* Did you mean 'ring'"),
        (bench_context, "--strategies", "deepspeed_ulyses", "Did you mean 'deepspeed_ulysses'"),
        (bench_context, "--layouts", "zigzig", "layout 'zigzig' does not exist.* Did you mean 'zigzag'"),
        (bench_context, "--mechanisms", "dens", "mechanism 'dens' does not exist.* Did you mean 'dense'"),
    ],
)
def test_unknown_names_are_refused(
    tool: ModuleType, option: str, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([option, name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("tool", "option", "value"),
    [
        (bench_attention, "--tokens", "8G"),
        (bench_attention, "--tokens", ""),
        (bench_attention, "--heads", "8:3"),
        (bench_attention, "--heads", "8"),
        (bench_attention, "--rounds", "2"),
        (bench_context, "--degrees", "1"),
        (bench_context, "--degrees", "2;4"),
        (bench_context, "--degrees", ""),
        (bench_context, "--rounds", "2"),
        (bench_experts, "--rounds", "2"),
        (bench_experts, "--experts", "0"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tool: ModuleType, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        tool.main([option, value])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("tool", [bench_attention, bench_checkpoint, bench_context, bench_experts, gpu_checks])
def test_without_a_gpu_cuda_is_refused_in_a_sentence(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda needs a CUDA GPU")
