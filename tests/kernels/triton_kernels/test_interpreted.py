"""The Triton backend on a CPU, in processes with Triton's interpreter switched on."""

from tests.support.triton_folder import run_with_triton


def test_kernels_equal_the_formula_when_interpreted() -> None:
    done = run_with_triton(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/triton_kernels/interpreted_attention.py",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_scans_equal_the_formula_when_interpreted() -> None:
    """In a process of its own, as its checks change the kernels' tilings."""
    done = run_with_triton(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_functions=check_*",
        "tests/kernels/triton_kernels/interpreted_linear_attention.py", TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "20 passed" in done.stdout


def test_products_of_experts_equal_the_formula_when_interpreted() -> None:
    done = run_with_triton(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/triton_kernels/interpreted_grouped.py",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
