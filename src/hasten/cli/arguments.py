"""What people type on a command line, read: a recipe and its settings, shares, times."""

from __future__ import annotations


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split a command line into the recipe it names, if any, and its ``key=value`` settings.

    Raises:
        RecipeError: two words that are no setting.
    """
    from hasten.errors import RecipeError, printable

    sources = [word for word in arguments if "=" not in word]
    if len(sources) > 1:
        raise RecipeError(
            f"{printable(sources[1])!r} is no setting; settings are written KEY=VALUE, and only one recipe is taken."
        )
    return (sources[0] if sources else None), [word for word in arguments if "=" in word]


def share(option: str, text: str | None) -> float | None:
    """Return the share that ``1%`` or ``0.01``, given for `option`, says; None where nothing was given.

    Raises:
        RecipeError: it says no share.
    """
    from hasten.duration import Duration
    from hasten.errors import RecipeError, printable

    if text is None:
        return None
    try:
        return Duration.parse(text).value if text.strip().endswith("%") else float(text)
    except (ValueError, RecipeError):
        raise RecipeError(f"{option} {printable(text)!r} is no share: give one such as 1% or 0.01.") from None


def shares(option: str, text: str | None) -> tuple[float, ...] | None:
    """Return the shares of a list such as ``0.5,65%``; ``none`` is an empty one.

    Raises:
        RecipeError: one of them is no share.
    """
    if text is None:
        return None
    if text.strip().lower() in ("", "none", "no"):
        return ()
    return tuple(share(option, part) for part in text.split(","))


def seconds(option: str, text: str | None) -> float | None:
    """Return the seconds of a time such as ``90min``; None where nothing was given.

    Raises:
        RecipeError: it is no time.
    """
    from hasten.duration import Duration
    from hasten.errors import RecipeError, printable

    if text is None:
        return None
    given = Duration.parse(text, positive=True)
    if given.unit != "seconds":
        raise RecipeError(f"{option} {printable(text)!r} is no time: give one such as 90min or 2h.")
    return given.value
