"""The Triton kernels compiled for an H100, on a machine that has none."""

from itertools import product
from pathlib import Path

from tests.support.triton_folder import ROOT, run_with_triton

TABLE = ROOT / "docs" / "kernels_sm90.md"
WHAT = 7
"""Columns that say what was compiled; those after them are what it needs, which changes with each Triton."""
ATTENTION = ("causal", "window and sinks", "neighborhood", "lifetimes", "tiles choose", "rows choose")
KERNELS = [
    *product(ATTENTION, ("forward", "delta", "dq", "dkv")),
    ("rows choose", "combine"),
    *product(("scan",), ("segment_updates", "segment_outputs")),
]
EXPERTS = ("swiglu", "swiglu_backward", "product", "weight")


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ")[:WHAT] for line in text.splitlines() if line.startswith("| ")]


def test_every_kernel_fits_and_is_on_the_table(tmp_path: Path) -> None:
    done = run_with_triton(
        "-m", "farspan.tools.kernel_report", str(tmp_path / "table.md"),
        TRITON_CACHE_DIR=str(ROOT / ".venv" / "triton-cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = rows((tmp_path / "table.md").read_text())
    assert found == rows(TABLE.read_text()), "run `python -m farspan.tools.kernel_report docs/kernels_sm90.md`"
    on_table = set()
    for plans, sizes, dtypes, kernel, *_ in found[1:]:
        on_table |= set(product(plans.split(", "), [kernel.partition(" ")[0]], sizes.split(", "), dtypes.split(", ")))
    sizes, dtypes = ("64", "128", "192/128", "256"), ("bfloat16", "float16", "float32")
    expected = {(*kernel, *cell) for kernel in KERNELS for cell in product(sizes, dtypes)}
    assert on_table == expected | set(product(("experts",), EXPERTS, ("1024/512", "1000/500"), dtypes))
