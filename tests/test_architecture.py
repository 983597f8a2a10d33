"""The house holds: layers, allowed packages, nothing that runs foreign code, a light and silent import."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import hasten

SOURCE = Path(hasten.__file__).parent
MAX_LINES = 400

# A room imports only rooms of a lower layer; files of one room may import each other. `errors` is the ground.
LAYERS = (
    {"errors"},
    {"cache", "files", "duration", "schedules", "distributed", "sharding"},
    {"data", "model", "optim", "clip", "guard", "precision", "parallel"},
    {"recipe"},
    {"checks", "evaluation", "generation", "exports", "checkpoint", "record", "pacing", "proof"},
    {"loop", "pool", "statistics"},
    {"report", "planning", "comparison", "restarts"},
    {"cli"},
    {"__init__", "__main__"},
)

# What a room may import from outside as soon as it is imported itself. Inside functions, the dependencies and the
# optional packages are allowed too: there they cost nothing to who does not use them.
PACKAGES = {
    "data": {"numpy", "tokenizers", "torch"},
    "model": {"safetensors", "torch"},
    "optim": {"torch"},
    "clip": {"torch"},
    "parallel": {"torch"},
    "sharding": {"torch"},
    "precision": {"torch"},
    "recipe": {"annotated_types", "pydantic", "tomli", "tomli_w", "typing_extensions"},
    "evaluation": {"numpy", "torch"},
    "generation": {"numpy", "torch"},
    "exports": {"safetensors", "torch"},
    "checkpoint": {"numpy", "torch"},
    "loop": {"numpy", "torch"},
    "statistics": {"numpy", "scipy"},
    "report": {"jinja2", "markupsafe", "matplotlib", "numpy", "tomli"},
    "comparison": {"tomli"},
    "cli": {"rich", "typer"},
}
DEPENDENCIES = {
    "jinja2",
    "matplotlib",
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "tokenizers",
    "tomli_w",
    "torch",
    "typer",
}
OPTIONAL = {"datasets", "fsspec", "kitoken", "pyarrow", "ray", "tiktoken", "transformers", "zstandard"}

RUNS_FOREIGN_CODE = {"cloudpickle", "cPickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}


@dataclass(frozen=True)
class Import:
    """One imported module: its full name, the line, whether it happens as soon as the file is imported."""

    name: str
    line: int
    at_once: bool


@dataclass(frozen=True)
class Module:
    """A file of the package."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.path.relative_to(SOURCE).parts[0].removesuffix(".py")

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, at_once=True))

    def __str__(self) -> str:
        return str(self.path.relative_to(SOURCE.parent))


def _imports(node: ast.AST, *, at_once: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_once) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            # `from hasten import errors` names a room; `from hasten.errors import DataError` names one already.
            whole = child.module == "hasten"
            names = [f"hasten.{alias.name}" for alias in child.names] if whole else [child.module or ""]
            yield from (Import(name, child.lineno, at_once) for name in names)
        elif isinstance(child, ast.Call) and (name := _imported_by_call(child)):
            yield Import(name, child.lineno, at_once)
        else:
            is_later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_for_types(child)
            yield from _imports(child, at_once=at_once and not is_later)


def _imported_by_call(node: ast.Call) -> str | None:
    """Return what ``importlib.import_module("name")`` imports."""
    is_literal = len(node.args) == 1 and isinstance(node.args[0], ast.Constant)
    return node.args[0].value if is_literal and ast.unparse(node.func) == "importlib.import_module" else None


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


MODULES = [Module(path) for path in sorted(SOURCE.rglob("*.py"))]
every_module = pytest.mark.parametrize("module", MODULES, ids=str)


def layer_of(room: str) -> int:
    """Return the number of the layer that `room` is in."""
    found = [number for number, rooms in enumerate(LAYERS) if room in rooms]
    assert len(found) == 1, f"the room {room!r} is in {len(found)} layers; draw it in LAYERS and in DESIGN.md"
    return found[0]


def test_every_room_of_the_picture_exists():
    assert {module.room for module in MODULES} == set().union(*LAYERS)


@every_module
def test_a_room_imports_only_rooms_below_it(module):
    for imported in module.imports:
        package, _, rest = imported.name.partition(".")
        room = rest.split(".")[0] if not rest.startswith("__") else ""
        if package != "hasten" or not room or room == module.room:
            continue
        assert layer_of(room) < layer_of(module.room), f"{module}:{imported.line} imports {imported.name}"


@every_module
def test_a_room_imports_only_packages_it_may(module):
    allowed_at_once = PACKAGES.get(module.room, set())
    for imported in module.imports:
        package = imported.name.partition(".")[0]
        if package in sys.stdlib_module_names or package == "hasten":
            continue
        allowed = allowed_at_once if imported.at_once else allowed_at_once | DEPENDENCIES | OPTIONAL
        assert package in allowed, f"{module}:{imported.line} imports {package}"


def test_the_packages_allowed_are_the_ones_declared():
    pyproject = SOURCE.parents[1] / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("installed without its pyproject.toml")
    declared = set(re.findall(r'^\s*"?([A-Za-z0-9_-]+)(?:>=|==)', pyproject.read_text(encoding="utf-8"), re.MULTILINE))
    inline = re.findall(r'"([A-Za-z0-9_-]+)>=', pyproject.read_text(encoding="utf-8"))
    declared = {name.replace("-", "_").lower() for name in {*declared, *inline}}
    # They come with pydantic and with jinja2.
    implied = {"annotated_types", "typing_extensions", "markupsafe"}
    assert set().union(DEPENDENCIES, OPTIONAL, *PACKAGES.values()) - implied <= declared


@every_module
def test_nothing_runs_code_from_a_file(module):
    for imported in module.imports:
        assert imported.name.partition(".")[0] not in RUNS_FOREIGN_CODE, f"{module}:{imported.line}"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{module}:{node.lineno} calls {called}"
        assert called not in {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "torch.save"}, where
        # A name that comes from somewhere could be anything; the front door's names come from its own table.
        is_free = called == "importlib.import_module" and not _imported_by_call(node)
        assert not is_free or module.room == "__init__", where
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for name in ("allow_pickle", "trust_remote_code", "shell"):
            assert settings.get(name, "False") == "False", f"{where} with {name}"
    for word in ("torch.load", "yaml.load", "cloudpickle", "numpy.load"):
        assert word not in module.text, f"{module} mentions {word}"


@every_module
def test_errors_are_named(module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert ast.unparse(node.exc).split("(")[0] not in {"Exception", "BaseException"}, f"{module}:{node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}:{node.lineno} catches everything"


@every_module
def test_a_module_is_one_noun_of_readable_size(module):
    docstring = ast.get_docstring(module.tree)
    assert docstring, f"{module} has no docstring"
    first, *rest = docstring.split("\n")
    assert first.rstrip().endswith((".", ":")), f"{module}: the first line of the docstring is a sentence by itself"
    assert not rest or not rest[0].strip() or first.endswith(":"), f"{module}: a blank line follows the first"
    assert len(module.text.splitlines()) <= MAX_LINES, f"{module} has more than {MAX_LINES} lines"
    assert module.path.stem not in {"utils", "helpers", "common", "misc", "manager", "base"}, str(module)


@every_module
def test_what_is_public_says_what_it_does(module):
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}:{node.lineno} {node.name} has no docstring"


# --- the front door -------------------------------------------------------------------------------------------------


def test_public_names_are_sorted_and_lazy():
    assert hasten.__all__ == sorted(hasten.__all__) == sorted(hasten._HOMES)
    assert set(hasten.__all__) <= set(dir(hasten))
    tree = next(module for module in MODULES if module.path == SOURCE / "__init__.py").tree
    block = next(node for node in tree.body if _is_for_types(node))
    typed = {
        alias.name: node.module for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == hasten._HOMES
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hasten.nothing


@pytest.mark.parametrize("name", sorted(hasten._HOMES))
def test_a_public_name_leads_to_its_home(name):
    value = getattr(hasten, name)
    assert value is getattr(importlib.import_module(hasten._HOMES[name]), name)
    assert callable(value)
    # A module of the same name would hide the function as soon as it is imported.
    assert not (SOURCE / f"{name}.py").exists()
    assert not (SOURCE / name).is_dir()


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter and return everything that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_light_and_silent():
    code = "import hasten, sys; heavy = {name.partition('.')[0] for name in sys.modules}"
    heavy = sorted(DEPENDENCIES | OPTIONAL)
    assert run_python(f"{code} & set({heavy!r}); assert not heavy, heavy") == ""


def test_foundations_and_recipes_need_no_torch():
    rooms = "errors, duration, schedules, distributed, recipe"
    code = f"import sys; from hasten import {rooms}; assert not {{'torch', 'matplotlib', 'numpy'}} & set(sys.modules)"
    assert run_python(code) == ""


def test_the_command_line_answers_without_torch():
    code = (
        "import sys; from hasten.cli import main\n"
        "sys.argv = ['hasten', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    assert "train" in run_python(code)
