"""A long text cut into pieces whose tokens, one after another, are those of the whole.

Tokenizing takes up to 150 bytes of memory for each byte of text, so that a book goes through in pieces. Not every cut
leaves the tokens alone: BPE merges across it, normalizers trim or prepend at the ends of a piece, an added token lies
across it. So a cut is taken only where the text around it has the same tokens in one part and in two. What depends on
text farther away, such as the parity of pairs, shows as a difference between contexts that begin at different places.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np

Encode = Callable[[str], np.ndarray]

PIECE_BYTES = 1 << 18
CONTEXT_BYTES = 1000
"""On each side of a cut, tokenized to check it."""
SEARCHED_BYTES = 2000
"""How far to look for a cut behind a place."""
# Spaces begin, spaces end, words begin or end.
BORDER = re.compile(r"(?<=\S)(?=\s)|(?<=\s)(?=\S)|\b")
TRIES = 40
"""Borders to check behind a place; most tokenizers need one or two."""


def pieces(text: bytes, start: int, stop: int, encode: Encode) -> Iterator[tuple[bytes, bool]]:
    """Yield UTF-8 `text[start:stop]` in pieces, with whether each is the last one.

    Of PIECE_BYTES or somewhat more; longer, up to all of it, where no cut is found. A piece may leave out the space
    before it, where the tokenizer itself puts one there.
    """
    while start < stop:
        end, following = _cut(text, start, stop, encode)
        yield text[start:end], following == stop
        start = following


def _cut(text: bytes, start: int, stop: int, encode: Encode) -> tuple[int, int]:
    """Return where the piece from `start` ends, and where the next one starts."""
    size = PIECE_BYTES
    while stop - start > 2 * size:
        for end, following in _candidates(text, start + size):
            if _joins(text, end, following, encode):
                return end, following
        # Few tries in a text without a cut, which has to be tokenized as a whole.
        size *= 2
    return stop, stop


def _candidates(text: bytes, place: int) -> Iterator[tuple[int, int]]:
    """Yield places for a cut behind `place`, see `_cut`."""
    place = character_start(text, place)
    searched = text[place : character_start(text, place + SEARCHED_BYTES)].decode()
    for _, border in zip(range(TRIES), BORDER.finditer(searched), strict=False):
        stop = place + len(searched[: border.start()].encode())
        yield stop, stop
        if text[stop : stop + 1] == b" ":
            yield stop, stop + 1


def _joins(text: bytes, stop: int, following: int, encode: Encode) -> bool:
    """Return whether [.., stop) and [following, ..) have the tokens of both together, in contexts around the cut."""
    end = character_start(text, following + CONTEXT_BYTES)
    right = encode(text[following:end].decode())
    return all(
        np.array_equal(encode(text[begin:end].decode()), np.append(encode(text[begin:stop].decode()), right))
        for begin in _beginnings(text, stop)
    )


def _beginnings(text: bytes, stop: int) -> set[int]:
    """Return where contexts of a cut begin: at two neighboring characters and, if there are any, at two spaces."""
    first = character_start(text, max(stop - CONTEXT_BYTES, 0))
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
