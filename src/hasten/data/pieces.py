"""The text of files as pieces in columns: many tiny documents, or parts of a huge one, in one step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

from hasten.data import counts
from hasten.data.counts import Counts
from hasten.data.cutting import PIECE_CHARACTERS, cut
from hasten.data.formats import fragments
from hasten.data.sources import SourceFile
from hasten.errors import DataError, printable

# How a piece stands to the one before it in reading order.
FOLLOWS, STARTS, CONTINUES = range(3)

_MAX_BAD_BYTES, _JUDGED_BYTES = 0.10, 1 << 20
_TO_REPLACE = re.compile("[\0\ud800-\udfff]")


class Run(NamedTuple):
    """Pieces of one file that follow each other: a column for each thing known of them.

    Attributes:
        units: for each piece the name of what the split decides about, a document or a block of one.
        documents: the name of its document, to show.
        texts: valid Unicode without NUL, up to 64 Ki characters; line ends as in the source.
        sizes: the bytes it had in the source (a replaced byte counts once; JSON is unescaped first).
        kinds: STARTS begins a document, FOLLOWS is a later piece of the same unit, CONTINUES begins a further block.
    """

    units: list[str]
    documents: list[str]
    texts: list[str]
    sizes: list[int]
    kinds: list[int]


def runs(
    files: list[SourceFile],
    *,
    text_key: str,
    separator: str | None,
    tally: Counts,
    block: int | None,
    characters: int,
) -> Iterator[Run]:
    """Yield the documents that hold text, in pieces, or cut into blocks of `block` characters that are units.

    What goes on per document here is what preparing tiny documents costs, so whole short ones are only listed; what
    has to be looked at in their text is looked at once for all of a run.

    Args:
        files: in reading order.
        text_key: as for `fragments`.
        separator: as for `fragments`.
        tally: counts what was replaced or dropped.
        block: characters of a block; None: documents are whole.
        characters: a run ends as soon as it holds as many.
    """
    limit = block or PIECE_CHARACTERS
    for file in files:
        watch = _ByteWatch(file.name, tally)
        units, documents, texts, kinds = columns = ([], [], [], [])
        held = 0
        stream = fragments(file, text_key=text_key, separator=separator, tally=tally)
        for document, group in groupby(stream, key=itemgetter(0)):
            fragments_of_it = iter(group)
            _, text = next(fragments_of_it)
            more = next(fragments_of_it, None)
            if more is None and len(text) <= limit:
                parts = (text,) if text and not text.isspace() else ()
            else:
                rest = () if more is None else chain((more,), fragments_of_it)
                parts = _without_blank_start(cut(chain((text,), map(itemgetter(1), rest)), limit))
            index = -1
            for index, part in enumerate(parts):
                units.append(document if block is None else f"{document}#{index}")
                documents.append(document)
                texts.append(part)
                kinds.append(STARTS if index == 0 else FOLLOWS if block is None else CONTINUES)
                held += len(part)
                if held >= characters:
                    yield watch.run(*columns)
                    units, documents, texts, kinds = columns = ([], [], [], [])
                    held = 0
            if index < 0:
                tally.add(counts.EMPTY_DOCUMENT, document)
        if texts:
            yield watch.run(*columns)
        watch.finish()


def _without_blank_start(texts: Iterator[str]) -> Iterator[str]:
    started = False
    for text in texts:
        started = started or not text.isspace()
        if started:
            yield text


class _ByteWatch:
    """Replaces what is not text in the pieces of one file, counts it, and stops when the file is mostly that."""

    def __init__(self, name: str, tally: Counts) -> None:
        self._name, self._tally = name, tally
        self._bytes = self._bad = self._begin = 0

    def run(self, units: list[str], documents: list[str], texts: list[str], kinds: list[int]) -> Run:
        """Return the pieces with their sizes, made valid."""
        if self._bad or (sizes := _clean_sizes(texts)) is None:
            texts, sizes = map(list, zip(*map(self._checked, documents, texts, kinds)))
        else:
            if STARTS in kinds:
                last = len(kinds) - 1 - kinds[::-1].index(STARTS)
                self._begin = self._bytes + sum(sizes[:last])
            self._bytes += sum(sizes)
        return Run(units, documents, texts, sizes, kinds)

    def _checked(self, document: str, text: str, kind: int) -> tuple[str, int]:
        if kind == STARTS:
            self._begin = self._bytes
        try:
            size = len(text.encode())
            is_clean = "\0" not in text
        except UnicodeEncodeError:
            is_clean = False
        if not is_clean:
            text, size = self._replaced(text, f"{document} byte {self._bytes - self._begin}")
        self._bytes += size
        if self._bytes > _JUDGED_BYTES:
            self.finish()
        return text, size

    def _replaced(self, text: str, place: str) -> tuple[str, int]:
        size = len(text.encode("utf-8", "surrogatepass"))
        for odd in _TO_REPLACE.findall(text):
            kind = counts.LONE_SURROGATES
            if odd == "\0":
                kind = counts.NUL_BYTES
            elif "\udc80" <= odd <= "\udcff":
                kind, size = counts.BAD_BYTES, size - 2
            self._bad += 1
            self._tally.add(kind, f"{place} or later")
        return _TO_REPLACE.sub("\ufffd", text), size

    def finish(self) -> None:
        """Raise DataError when more than a tenth of the bytes so far were no text."""
        if self._bad > _MAX_BAD_BYTES * self._bytes:
            raise DataError(
                f"{printable(self._name)} is not UTF-8 text: {self._bad} of {self._bytes} bytes are invalid or NUL; "
                "convert it (iconv -f ENCODING -t utf-8) or leave it out."
            )


def _clean_sizes(texts: list[str]) -> list[int] | None:
    """Return the bytes of each text, or None when any of them holds what has to be replaced."""
    joined = "".join(texts)
    if "\0" in joined:
        return None
    if joined.isascii():
        return list(map(len, texts))
    try:
        joined.encode()
    except UnicodeEncodeError:  # never of two halves in two texts: a lone surrogate is refused wherever it is
        return None
    return [len(text.encode()) for text in texts]
