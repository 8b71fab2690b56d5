"""The Triton kernels on a CPU, in two processes with Triton's interpreter switched on."""

import pytest

from tests.support.triton_folder import run_with_triton

FILES = {
    "attention": ("attention", "gathered", "tile_lists", "type_sums", "choice"),
    "recurrences and layers": ("linear_attention", "grouped", "layers"),
}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_kernels_equal_formulas_and_the_host(files: tuple[str, ...]) -> None:
    paths = [f"tests/kernels/triton_kernels/interpreted_{name}.py" for name in files]
    done = run_with_triton("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
