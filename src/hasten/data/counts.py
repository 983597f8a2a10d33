"""What was replaced, dropped or skipped while reading text: how often, and where first."""

from __future__ import annotations

from hasten.errors import printable

PLACES_SHOWN = 5

BAD_RECORD = "unusable JSON records"
EMPTY_DOCUMENT = "empty documents dropped"
BAD_BYTES = "invalid UTF-8 bytes replaced by U+FFFD"
LONE_SURROGATES = "lone surrogates replaced by U+FFFD"
NUL_BYTES = "NUL bytes replaced by U+FFFD"
BYTE_ORDER_MARKS = "byte order marks dropped"
HIDDEN_FILES = "hidden files skipped"
BINARY_FILES = "binary files skipped"
SPECIAL_FILES = "special files skipped"


class Counts:
    """Amounts by kind, each with its first five places.

    Example:
        >>> counts = Counts()
        >>> counts.add("NUL bytes replaced by U+FFFD", "notes.txt byte 12", 3)
        >>> counts.sentences()
        ['3 NUL bytes replaced by U+FFFD (notes.txt byte 12)']
    """

    def __init__(self) -> None:
        self.amounts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}
        self.records_read = 0
        self.bytes_read = 0

    def add(self, kind: str, place: str, amount: int = 1) -> None:
        """Count `amount` more of `kind`; remember `place` if it is among the first five."""
        self.amounts[kind] = self.amounts.get(kind, 0) + amount
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES_SHOWN:
            places.append(printable(place))

    def on_read(self, count: int) -> None:
        """Count `count` more bytes read from disk."""
        self.bytes_read += count

    def add_all(self, other: Counts) -> None:
        """Count everything that `other` counted."""
        for kind, amount in other.amounts.items():
            self.amounts[kind] = self.amounts.get(kind, 0) + amount
            places = self.places.setdefault(kind, [])
            places.extend(other.places[kind][: PLACES_SHOWN - len(places)])
        self.records_read += other.records_read

    def sentences(self) -> list[str]:
        """Return one line per kind, with its first places."""
        return [f"{amount} {kind} ({self.show(kind)})" for kind, amount in sorted(self.amounts.items())]

    def show(self, kind: str) -> str:
        """Return the first places of `kind` as one line."""
        places = self.places.get(kind, [])
        more = self.amounts.get(kind, 0) > len(places)
        return "; ".join(places) + ("; ..." if more else "")

    def to_json(self) -> dict:
        """Return a JSON-able copy."""
        return {kind: {"amount": n, "places": self.places[kind]} for kind, n in sorted(self.amounts.items())}
