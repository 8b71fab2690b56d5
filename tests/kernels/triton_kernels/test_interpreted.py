"""The Triton kernels on a CPU, in processes with Triton's interpreter switched on."""

from tests.support.triton_folder import run_with_triton


def interpret(name: str, *options: str) -> str:
    """Run a file of tests in a process of its own, as these change tilings; return its output."""
    path = f"tests/kernels/triton_kernels/{name}.py"
    done = run_with_triton("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_attention_equals_the_formula() -> None:
    interpret("interpreted_attention")


def test_attention_of_gathered_rows_equals_the_formula() -> None:
    interpret("interpreted_gathered")


def test_block_masks_made_on_the_device_equal_those_of_the_host() -> None:
    interpret("interpreted_tile_lists")


def test_what_types_learn_equals_the_loop_over_tiles() -> None:
    interpret("interpreted_type_sums")


def test_recurrences_equal_the_formula() -> None:
    assert "21 passed" in interpret("interpreted_linear_attention", "-o", "python_functions=check_*")


def test_products_of_experts_equal_the_formula() -> None:
    interpret("interpreted_grouped")


def test_layers_equal_the_formula() -> None:
    interpret("interpreted_layers")


def test_choices_of_blocks_are_those_of_the_host() -> None:
    interpret("interpreted_choice")
