"""A long text cut into pieces whose tokens, one after another, are those of the whole.

Tokenizing takes up to 150 bytes of memory for each byte of text, so that a book goes through in pieces. Not every cut
leaves the tokens alone: BPE merges across it, normalizers trim or prepend at the ends of a piece, an added token lies
across it. So a cut is taken only where the text around it has the same tokens in one part and in two. What depends on
text farther away, such as the parity of pairs, shows as a difference between contexts that begin at different places;
where it could hide, in long words that repeat themselves or are tokenized as a whole, no cut is taken.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

Encode = Callable[[str], np.ndarray]
Words = Callable[[str], Sequence[int | None]]

PIECE_BYTES = 1 << 18
CONTEXT_BYTES = 1000
"""On each side of a cut, tokenized to check it."""
SEARCHED_BYTES = 2000
"""How far to look for a cut behind a place."""
# Spaces begin or end; most tokenizers cut there, whatever the words are.
SPACE_BORDER = re.compile(r"(?<=\S)(?=\s)|(?<=\s)(?=\S)")
LETTER_BORDER = re.compile(r"(?<=\S)\b(?=\S)")
REPEATED_BYTES = 100
"""A text without spaces that repeats so much of itself nearby is monotonous."""
LEAD_BYTES = 32
"""Context before a piece, where it needs one."""
TRIES = 10
"""Borders of each kind to check behind a place; most tokenizers need one or two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a text, with some context before it where a tokenizer treats the start of a text in its own way."""

    text: bytes
    """UTF-8."""
    context_tokens: int
    """How many of its first tokens are those of the context."""
    is_last: bool


def pieces(text: bytes, start: int, stop: int, encode: Encode, words: Words | None = None) -> Iterator[Piece]:
    """Yield UTF-8 `text[start:stop]` in pieces of PIECE_BYTES or somewhat more; longer ones where no cut is found.

    words: see `Tokenizer.words`.
    """
    context_tokens = 0
    while start < stop:
        end, following, following_tokens = _cut(text, start, stop, encode, words)
        yield Piece(text=text[start:end], context_tokens=context_tokens, is_last=end == stop)
        start, context_tokens = following, following_tokens


def _cut(text: bytes, start: int, stop: int, encode: Encode, words: Words | None) -> tuple[int, int, int]:
    """Return where the piece from `start` ends, where the next one starts, and how many tokens of context it has."""
    size = PIECE_BYTES
    while stop - start > 2 * size:
        for cut in _candidates(text, start + size):
            for following in (cut, character_start(text, cut - LEAD_BYTES)):
                context_tokens = _context_tokens(text, cut, following, encode, words)
                if context_tokens is not None:
                    return cut, following, context_tokens
        # Few tries in a text without a cut, which has to be tokenized as a whole.
        size *= 2
    return stop, stop, 0


def _candidates(text: bytes, place: int) -> Iterator[int]:
    """Yield places for a cut behind `place`, those at spaces first."""
    place = character_start(text, place)
    searched = text[place : character_start(text, place + SEARCHED_BYTES)].decode()
    for kind in (SPACE_BORDER, LETTER_BORDER):
        for border in islice(kind.finditer(searched), TRIES):
            cut = place + len(searched[: border.start()].encode())
            if kind is SPACE_BORDER or not _repeats(text, cut):
                yield cut


def _repeats(text: bytes, cut: int) -> bool:
    """Return whether the text before a cut repeats itself: its tokens may depend on where that began."""
    repeated = text[max(cut - REPEATED_BYTES, 0) : cut]
    return text.find(repeated, max(cut - CONTEXT_BYTES, 0), cut - 1) >= 0


def _context_tokens(text: bytes, cut: int, following: int, encode: Encode, words: Words | None) -> int | None:
    """Return the tokens of [following, cut), which are no tokens of the piece behind `cut`; None where it is no cut."""
    end = character_start(text, cut + CONTEXT_BYTES)
    count = len(encode(text[following:cut].decode())) if following < cut else 0
    right = encode(text[following:end].decode())[count:]
    for begin in _beginnings(text, cut):
        whole, left = text[begin:end].decode(), encode(text[begin:cut].decode())
        # Without tokens on one side, more text there could change what is around the cut.
        if not (len(left) and len(right) and np.array_equal(encode(whole), np.append(left, right))):
            return None
        if words is not None:
            numbers = words(whole)
            if numbers[len(left) - 1] == numbers[len(left)]:
                return None
    return count


def _beginnings(text: bytes, cut: int) -> set[int]:
    """Return where contexts of a cut begin: at two neighboring characters and, if there are any, at two spaces."""
    first = character_start(text, max(cut - CONTEXT_BYTES, 0))
    second = character_start(text, max(first - 1, 0))
    found = {first, second}
    for _ in range(2):
        second = text.rfind(b" ", max(first - CONTEXT_BYTES, 0), second)
        if second < 0:
            break
        found.add(second)
    return found


def character_start(text: bytes, place: int) -> int:
    """Return where the character that `place` lies in starts; the end of the text behind it."""
    place = min(place, len(text))
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place
