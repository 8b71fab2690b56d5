"""What a pass chooses by content, kept for the pass that recomputes its activations.

The second pass of a block takes what the first one chose, in the same order, instead of choosing again:

    first, second = choices_of_two_passes()
    with first:
        a, b = kept(choose_a), kept(choose_b)       chooses both
    with second:
        a, b = kept(choose_a), kept(choose_b)       calls neither

The two agree even where a kernel is not the same to the last bit each time. `torch.utils.checkpoint` takes the pair as
its `context_fn`, and frees it with the block's graph.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from typing import Any, TypeVar, final

T = TypeVar("T")
_PASS: ContextVar["_Pass | None"] = ContextVar("pass", default=None)


def kept(choose: Callable[[], T]) -> T:
    """Return what `choose` returns; in the second of two passes, what it returned in the first."""
    active = _PASS.get()
    return choose() if active is None else active.next(choose)


def choices_of_two_passes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a pass, and for those that repeat it."""
    choices: list[Any] = []
    return _Pass(choices, repeats=False), _Pass(choices, repeats=True)


@final
class _Pass(AbstractContextManager[None]):
    """May be entered again: a graph that is kept is recomputed in each of its backward passes."""

    def __init__(self, choices: list[Any], *, repeats: bool) -> None:
        self.choices, self.repeats = choices, repeats
        self.number = 0
        self.token: Token[_Pass | None] | None = None

    def next(self, choose: Callable[[], T]) -> T:
        if not self.repeats:
            self.choices.append(choose())
        self.number += 1
        return self.choices[self.number - 1]

    def __enter__(self) -> None:
        # Recomputation may stop early, as soon as it has what was asked for.
        self.number = 0
        self.token = _PASS.set(self)

    def __exit__(self, *_: object) -> None:
        assert self.token is not None
        _PASS.reset(self.token)
