"""Small experts in threads of their own: the same results as in one, and about as many rows for each thread."""

import threading
from collections.abc import Iterator

import pytest
import torch

from farspan.kernels.moe import grouped_loop
from farspan.kernels.moe.grouped_loop import for_each_expert, share_out
from tests.kernels.moe.test_grouped_gemm import test_equals_the_formula as check_formula

CPU = torch.device("cpu")


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
def test_each_expert_with_rows_comes_once_large_ones_to_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_loop, "SHARED_ROWS", 8)
    calls: dict[int, tuple[bool, int, bool]] = {}

    def work(expert: int) -> None:
        assert expert not in calls
        main = threading.current_thread() is threading.main_thread()
        calls[expert] = main, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        for_each_expert([3, 0, 9, 1, 8, 2], CPU, work)
    assert calls == {expert: (True, 2, False) if expert in (2, 4) else (False, 1, False) for expert in (0, 2, 3, 4, 5)}


@pytest.mark.usefixtures("_two_threads")
def test_errors_in_threads_are_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        for_each_expert([1, 1, 1], CPU, lambda expert: print(1 // (expert - 1)))


def test_shares_have_about_as_many_rows() -> None:
    counts = [5, 1, 9, 2, 0, 4, 3]
    assert share_out([0, 1, 2, 3, 5, 6], counts, 2) == [[2, 6], [0, 5, 3, 1]]


@pytest.mark.usefixtures("_two_threads")
def test_products_equal_the_formula() -> None:
    check_formula([3, 1, 0, 7, 2], torch.float64)
