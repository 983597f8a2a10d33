"""What a user is told when something is wrong.

HastenError                 something a person can put right; the command line prints its one sentence
├── RecipeError             a setting: unknown, of the wrong type, out of range, contradictory
├── DataError               a corpus, a tokenizer or prepared data that cannot be used
│   └── DamagedData         tokens of a step, and only those: a run may leave the step out
├── CheckpointError         no saved state that can be trusted
└── RunError                a run folder, a device or a disk that cannot be used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 1500


class HastenError(Exception):
    """Says in one sentence what was given, what was expected and what to do.

    Whatever a file or a setting put into it, it is one line of printable characters of bounded length.

    Example:
        >>> str(DataError("a\\x1b[31m\\nb holds no text."))
        'a\\\\x1b[31m\\\\nb holds no text.'
    """

    exit_code = 2

    def __str__(self) -> str:
        return one_line(super().__str__(), LONGEST)


class RecipeError(HastenError):
    """A setting is unknown, of the wrong type, out of range or at odds with another."""


class DataError(HastenError):
    """A corpus, a tokenizer or prepared data cannot be used."""


class DamagedData(DataError):
    """Stored tokens are not what was written; what else was prepared is not in doubt.

    Args:
        message: what is damaged and what to do.
        file: its name.
        block: which of its blocks of 1 MiB, counted from 0; None: all of it, missing or of another size.
    """

    def __init__(self, message: str, *, file: str = "", block: int | None = None) -> None:
        super().__init__(message)
        self.file, self.block = file, block


class CheckpointError(HastenError):
    """No saved state can be trusted."""


class RunError(HastenError):
    """A run folder, a device or a disk cannot be used."""


class SaidElsewhere(HastenError):
    """What is wrong is said by the first process of a run, for all of them."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``", did you mean 'x'?"`` for the closest of `known` (two where both are as close), ``""`` when none is.

    Example:
        >>> nearest("wieght_decay", ["lr", "weight_decay"])
        ", did you mean 'weight_decay'?"
    """
    close = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
    alike = [difflib.SequenceMatcher(None, word, name).ratio() for word in close]
    close = [word for word, ratio in zip(close, alike, strict=True) if ratio > alike[0] - 0.1]
    return f", did you mean {' or '.join(repr(word) for word in close)}?" if close else ""


def printable(text: str) -> str:
    r"""Return `text` with control characters escaped, so that no file or setting can drive a terminal.

    Newlines and tabs stay. Everything else that moves a cursor, changes a colour, breaks a line or turns the
    direction of writing becomes its escape.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    return "".join(c if c in "\n\t" or _is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, longest: int = 80) -> str:
    r"""Return `text` for a message: control characters and line ends escaped, cut at `longest` characters.

    Example:
        >>> one_line("a\nb"), one_line("x" * 100, 8)
        ('a\\nb', 'xxxxx...')
    """
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def _is_plain(character: str) -> bool:
    code = ord(character)
    is_control = code < 0x20 or 0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF
    breaks_line = code in (0x2028, 0x2029)
    turns_direction = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069 or code in (0x061C, 0x200E, 0x200F)
    return not (is_control or breaks_line or turns_direction)
