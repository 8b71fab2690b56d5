"""The Triton kernels compiled for an H100, on a machine that has none; recorded in docs/kernels_sm90.md.

They are compiled again only if their code or the pinned Triton has changed since, or if COMPILE_KERNELS is set.
"""

import os
from itertools import product
from pathlib import Path

from farspan.tools.kernel_report import code_digest
from tests.support.triton_folder import ROOT, run_with_triton

RECORD = ROOT / "docs" / "kernels_sm90.md"
COMMAND = "PYTHONPATH=.venv/triton-3.6.0 .venv/bin/python -m farspan.tools.kernel_report docs/kernels_sm90.md"
IDENTITY = 7
"""Columns that say what was compiled; those after them are resources, which change with each Triton."""
TILED = ("causal", "window and sinks", "neighborhood", "lifetimes", "tiles select")
KERNELS = [
    *product(TILED, ("forward", "delta", "dq", "dkv")),
    *product(("rows select",), ("histogram", "fill", "gathered_forward", "delta", "gathered_dq", "gathered_dkv")),
    ("tiles select", "narrow"),
    *product(("lifetimes",), ("narrow", "key_sums", "query_sums", "type_gradient")),
    *product(("recurrence",), ("span_updates", "span_outputs")),
    *product(
        ("choice",), ("sums", "means", "similar", "choose", "choose_chunked", "histogram", "digit", "weight", "select")
    ),
]
EXPERTS = ("swiglu", "swiglu_backward", "product", "weight")
HEADS = ("product", "weight")
LAYERS = ("rms_norm", "rms_norm_backward", "rope", "silu_product", "silu_product_backward")


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ")[:IDENTITY] for line in text.splitlines() if line.startswith("| ")]


def test_every_kernel_is_recorded_at_every_size_and_dtype() -> None:
    recorded = set()
    for plans, sizes, dtypes, kernel, *_ in rows(RECORD.read_text())[1:]:
        recorded |= set(product(plans.split(", "), [kernel.partition(" ")[0]], sizes.split(", "), dtypes.split(", ")))
    sizes, dtypes = ("64", "128", "192/128", "256"), ("bfloat16", "float16", "float32")
    expected = {(*kernel, *cell) for kernel in KERNELS for cell in product(sizes, dtypes)}
    for plan, kernels in (("experts", EXPERTS), ("heads", HEADS)):
        expected |= set(product((plan,), kernels, ("1024/512", "1000/500"), dtypes))
    assert recorded == expected | set(product(("layers",), LAYERS, ("4096/128", "5120/96", "8192/256"), dtypes))


def test_kernels_fit_and_are_those_of_the_record(tmp_path: Path) -> None:
    unchanged = f"Digest of the code: {code_digest()}" in RECORD.read_text()
    if unchanged and "COMPILE_KERNELS" not in os.environ:
        print("the kernels are those of docs/kernels_sm90.md: not compiled; `make test-all` compiles them")
        return
    done = run_with_triton(
        "-m", "farspan.tools.kernel_report", str(tmp_path / "record.md"),
        TRITON_CACHE_DIR=str(ROOT / ".venv" / "triton-cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert rows((tmp_path / "record.md").read_text()) == rows(RECORD.read_text()), f"write the record anew: {COMMAND}"
    assert unchanged, f"the kernels fit, but their code has changed: write the record anew: {COMMAND}"


def test_the_digest_follows_code_and_not_comments(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text('"""Doc."""\nX = 1\n\n\ndef f(a, b):\n    """Doc."""\n    return a + b  # why\n')
    before = code_digest(tmp_path)
    kernel.write_text("X = 1\ndef f(\n    a, b\n):\n    # why not\n    return (a + b)\n")
    assert code_digest(tmp_path) == before
    kernel.write_text("X = 1\ndef f(a, b):\n    return b + a\n")
    assert code_digest(tmp_path) != before
