"""No file that a person could have been handed is ever code: what the source may not use, and a watch on the rest."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import hostile_files as hostile
import pytest
from test_architecture import MODULES, Module, every_module

from hasten.errors import DataError

# Modules that unpack archives, load objects, run files or speak to a network. (Pickle and its like: test_architecture.)
BANNED = {
    "asyncio", "bdb", "code", "codeop", "dbm", "ftplib", "http", "imaplib", "imp", "pdb", "plistlib", "poplib",
    "pty", "requests", "runpy", "sched", "smtplib", "socketserver", "sqlite3", "ssl", "tarfile", "telnetlib",
    "urllib", "webbrowser", "xmlrpc", "zipfile", "zipimport",
}  # fmt: skip
# Calls by their last name, whoever has it.
BANNED_CALLS = {
    "exec_module", "execfile", "extract", "extractall", "find_class", "load_library", "load_module",
    "module_from_spec", "popen", "snapshot_download", "spec_from_file_location", "startfile", "unpack_archive",
    "urlopen", "urlretrieve",
}  # fmt: skip
BANNED_WHOLE = {"np.load", "numpy.load", "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "yaml.load"}
# Who starts processes: always a list of words, of our own interpreter or a compiler, and never a shell.
STARTS_PROCESSES = {
    "hasten/optim/native.py",
    "hasten/planning/measurement.py",
    "hasten/pool/guard.py",
    "hasten/pool/local.py",
}


@functools.cache
def called(module: Module) -> list[tuple[str, ast.Call]]:
    return [(dotted(node.func), node) for node in ast.walk(module.tree) if isinstance(node, ast.Call)]


def dotted(node: ast.expr) -> str:
    """Return ``a.b.c`` of a name; of a call's result and the like only what comes after it."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@every_module
def test_no_archive_no_network_no_file_as_a_module(module: Module) -> None:
    for imported in module.imports:
        assert imported.name.partition(".")[0] not in BANNED, f"{module}:{imported.line} imports {imported.name}"
    for name, node in called(module):
        where = f"{module}:{node.lineno} calls {name}"
        assert name.rpartition(".")[2] not in BANNED_CALLS, where
        assert name not in BANNED_WHOLE, where
        assert not name.startswith(("os.exec", "os.spawn", "os.posix_spawn", "os.popen", "sys.path.")), where
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert given.get("weights_only", "True") == "True", where
        assert given.get("shell", "False") == "False", where


def test_processes_are_started_where_it_is_known() -> None:
    starts = ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output", "os.fork")
    starting = {str(module) for module in MODULES if any(name in starts for name, _ in called(module))}
    assert starting == STARTS_PROCESSES


def test_nobody_but_the_front_door_looks_a_module_up_by_a_computed_name() -> None:
    for module in MODULES:
        for name, node in called(module):
            if name in ("importlib.import_module", "import_module"):
                is_literal = isinstance(node.args[0], ast.Constant)
                assert is_literal or module.room == "__init__", f"{module}:{node.lineno}"


class Evil:
    """Says what was run, when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.getenv, ("HOME",)


def import_a_file(folder: Path) -> None:
    (folder / "handed_over.py").write_text("x = 1\n")
    spec = importlib.util.spec_from_file_location("handed_over", folder / "handed_over.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


DEEDS = {
    "exec": lambda folder: exec("x = 1"),
    "eval": lambda folder: eval("1 + 1"),
    "compile": lambda folder: compile("x = 1", "handed over", "exec"),
    "pickle": lambda folder: pickle.loads(pickle.dumps(Evil())),
    "os.system": lambda folder: os.system("true"),
    "subprocess": lambda folder: subprocess.run([sys.executable, "-c", ""], check=True),
    "a file as a module": import_a_file,
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_watch_over_hostile_files_sees_every_way_to_run_one(tmp_path: Path, deed: str) -> None:
    with hostile.watched() as seen:
        DEEDS[deed](tmp_path)
    assert seen
    with hostile.watched() as seen:
        ast.parse("cosine(floor=0.1)")  # taken apart and not compiled: no code comes of it
    assert seen == []


def busy(seconds: float, error: Exception) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    raise error


def test_the_watch_over_hostile_files_sees_what_they_cost() -> None:
    held: list[bytes] = []
    with pytest.raises(AssertionError):
        hostile.harmless(lambda: held.append(b"x" * (2 * hostile.CONSTANT)))
    with pytest.raises(AssertionError):
        hostile.harmless(lambda: busy(1.1 * hostile.SECONDS, DataError("too late.")))
    with pytest.raises(ZeroDivisionError):
        hostile.harmless(lambda: 1 / 0)
