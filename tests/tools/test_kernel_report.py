"""The report of compiled kernels, from what compiling would return; tests/kernels/triton_kernels compiles them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from farspan.tools import kernel_report
from farspan.tools.kernel_report import SHARED_BYTES, Case, Usage, main

SMALL, LARGE = (Case("causal", size, size, torch.bfloat16) for size in (64, 128))


@pytest.mark.parametrize(
    ("stack", "shared", "status"),
    [(0, SHARED_BYTES, 0), (8, 1024, 1), (0, SHARED_BYTES + 1, 1), (8, SHARED_BYTES + 1, 1)],
)
def test_a_kernel_that_does_not_fit_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stack: int,
    shared: int,
    status: int,
) -> None:
    """Where registers spill, or where there is too little shared memory. One binary of two cases is one line."""
    both = Usage("forward", "64 x 64", 4, 2, 200, 0, 2048, "same")
    alone = Usage("dkv (dk)", "64 x 32", 8, 3, 255, stack, shared, "other")
    launched = {SMALL: [both], LARGE: [both, alone]}
    monkeypatch.setattr(kernel_report, "CASES", [SMALL, LARGE])
    monkeypatch.setattr(kernel_report, "compile_case", launched.__getitem__)
    monkeypatch.setattr(kernel_report, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    assert main(tmp_path / "record.md") == status
    line = f"| causal | 128 | bfloat16 | dkv (dk) | 64 x 32 | 8 | 3 | 255 | {stack} | {shared:,} |"
    assert (tmp_path / "record.md").read_text().splitlines()[-2:] == [
        "| causal | 64, 128 | bfloat16 | forward | 64 x 64 | 4 | 2 | 200 | 0 | 2,048 |", line
    ]  # fmt: skip
    assert capsys.readouterr().err == (f"does not fit: {line}\n" if status else "")
