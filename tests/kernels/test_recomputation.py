"""Choices kept for the pass that recomputes."""

from collections.abc import Callable
from threading import Thread

from farspan.kernels.recomputation import choices_of_two_passes, kept


def counted(calls: list[str]) -> Callable[[str], object]:
    def choose(name: str) -> object:
        return kept(lambda: (calls.append(name), object())[1])

    return choose


def test_a_repeated_pass_takes_the_choices_of_the_first_in_order() -> None:
    """Also when the graph is kept and recomputed again, and after a recomputation that stopped early."""
    calls: list[str] = []
    choose, (first, second) = counted(calls), choices_of_two_passes()
    with first:
        made = [choose("a"), choose("b")]
    for _ in range(2):
        with second:
            assert choose("a") is made[0]
        with second:
            assert [choose("a"), choose("b")] == made
    assert calls == ["a", "b"]
    assert choose("c") is not choose("c")
    assert calls == ["a", "b", "c", "c"]


def test_blocks_do_not_mix_their_choices() -> None:
    """Backward, the last block is recomputed first; on a GPU in a thread of autograd."""
    calls: list[str] = []
    choose, blocks, made = counted(calls), [choices_of_two_passes() for _ in range(2)], []
    for first, _ in blocks:
        with first:
            made.append(choose("a"))
    found = []

    def recompute() -> None:
        for _, second in reversed(blocks):
            with second:
                found.append(choose("a"))

    thread = Thread(target=recompute)
    thread.start()
    thread.join()
    assert found == made[::-1]
    assert len(calls) == 2
