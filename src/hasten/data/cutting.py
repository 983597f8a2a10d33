"""Text cut into pieces of bounded size, where a tokenizer would cut it too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 1 << 16
_TRIES = 2000


def cut(chunks: Iterable[str], limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield the text of `chunks` in pieces of at most `limit` characters; joined they are the text.

    The places depend on the text alone, not on how `chunks` arrive. A cut falls after a line end between two
    lines that begin and end with something, else before a line end or a space that follows something: there
    tokenizers of the GPT-2 kind have a boundary anyway, so tokens are those of the whole text. Else anywhere.
    """
    buffer, start = "", 0
    for chunk in chunks:
        buffer, start = buffer[start:] + chunk, 0
        while len(buffer) - start > limit:
            stop = _cut_point(buffer, start, start + limit)
            yield buffer[start:stop]
            start = stop
    if start < len(buffer):
        yield buffer[start:]


def _cut_point(text: str, start: int, stop: int) -> int:
    floor = (start + stop + 1) // 2
    place = stop
    for _ in range(_TRIES):
        place = text.rfind("\n", floor, place)
        if place < 0:
            break
        if not text[place + 1].isspace() and not text[place - 1].isspace():
            return place + 1
    for blank in "\n ":
        place = stop
        for _ in range(_TRIES):
            place = text.rfind(blank, floor, place)
            if place <= start:
                break
            if not text[place - 1].isspace():
                return place
    splits_line_end = text[stop - 1] == "\r" and text[stop] == "\n"
    return stop - 1 if splits_line_end and stop - 1 > start else stop
