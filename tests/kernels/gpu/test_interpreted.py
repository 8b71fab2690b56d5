"""The Triton backend on a CPU: `interpreted.py`, in one process with Triton's interpreter switched on."""

from tests.kernels.gpu.triton_folder import run_with_triton


def test_kernels_equal_the_formula_when_interpreted() -> None:
    done = run_with_triton(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/gpu/interpreted.py", TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
