"""What an attacker does to a file, and a watch on what a file makes us do."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from hasten.errors import HastenError, printable

# What a process does when a file has got the better of it.
FORBIDDEN = (
    "code.__new__", "ctypes.dlopen", "ftplib.connect", "http.client.connect", "marshal.load", "os.exec", "os.fork",
    "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pickle.find_class", "pty.spawn", "shutil.unpack_archive",
    "socket.bind", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "urllib.Request", "webbrowser.open",
)  # fmt: skip
SECONDS, CONSTANT = 1.0, 96 << 20
_INSTALLED = tuple(map(os.path.realpath, (sys.prefix, sys.base_prefix, Path(__file__).parents[1] / "src")))


@dataclasses.dataclass
class Watch:
    """Everything forbidden that happened while it was on."""

    on: bool = False
    seen: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "exec" and not _is_ours(getattr(args[0], "co_filename", "")):
            self.seen.append(f"exec of {args[0]!r:.200}")
        elif event == "compile" and args[1] is not None and str(args[1]) != "<unknown>" and not _is_ours(str(args[1])):
            self.seen.append(f"compile of {args[1]!r:.200}")  # `ast.parse` says "<unknown>", and makes no code
        elif event == "import" and args[1] is not None and not _is_ours(str(args[1])):
            self.seen.append(f"import of {args[0]} from {args[1]}")


def _is_ours(file: str) -> bool:
    """Say whether code comes from an installed file (`<frozen ...>` is the interpreter's own)."""
    return file.startswith("<frozen ") or os.path.realpath(file).startswith(_INSTALLED)


WATCH = Watch()
sys.addaudithook(WATCH)  # cannot be taken away again: it costs a comparison while it is off


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Yield a list of what is forbidden and happened anyway."""
    WATCH.on, WATCH.seen = True, []
    try:
        yield WATCH.seen
    finally:
        WATCH.on = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a hostile file was met: ``refused``, or ``taken`` where the change did no harm."""

    kind: str
    said: str
    seconds: float
    memory: int


def met(use: Callable[[], Any], most_lines: int = 1) -> Outcome:
    """Use a hostile file; anything but success or one error of ours, in one printable line, goes through."""
    kind, said = "taken", ""
    before = _peak(reset=True)
    began = time.process_time()
    with watched() as seen:
        try:
            use()
        except HastenError as error:
            kind, said = "refused", str(error)
    seconds = time.process_time() - began
    memory = _peak() - before
    assert not seen, seen
    assert printable(said) == said, said
    assert said.count("\n") < most_lines, said
    assert len(said) < 9000, said
    return Outcome(kind, said, seconds, memory)


def harmless(use: Callable[[], Any], size: int = 0) -> Outcome:
    """Use a hostile file of `size` bytes: refused within a second, and in twice its size of memory (and a constant)."""
    outcome = met(use)
    if outcome.seconds >= SECONDS:  # the first use of a thing imports it, and a busy machine is slow: once more
        outcome = met(use)
    assert outcome.kind == "taken" or outcome.seconds < SECONDS, outcome
    assert outcome.memory < 2 * size + CONSTANT, outcome
    return outcome


def _peak(*, reset: bool = False) -> int:
    """Return the most memory this process has had since the last reset, in bytes; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    except OSError:
        return 0


# Values that break what expects another: types, sizes, names of code, tags of ours, things that drive a terminal.
EVIL: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 2**31, 2**63, -(2**63), 10**400, 1e308, float("nan"), float("inf"),
    float("-inf"), "", "0", "nan", "os.system", "__import__('os').system('true')", "../../etc/passwd", "/dev/zero",
    "\x1b[31mred", "\u202eabc", "a\nb", "\x00", "{{ 7 * 7 }}", "x" * 5000, "\ud800", [], {}, [[]], [None], [1, "2"],
    {"": 0}, {"a": 1}, {"$tensor": "w"}, {"$tensor": ["w"]}, {"$tuple": 5}, {"$tuple": [1]}, {"$dict": [[[], 1]]},
    {"$dict": [[1]]}, {"$call": "os.system"}, {"__class__": "os"}, {"name": "x"}, [[0, 0.0], [0, 1.0]],
    json.loads("[" * 200 + "]" * 200), json.loads('{"a":' * 200 + "1" + "}" * 200), list(range(300)),
)  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside `value`, its own included."""
    yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*way, key))


def spoiled(value: Any, chance: random.Random, evil: tuple[Any, ...] = EVIL) -> Any:
    """Return plain data with one to three of its places replaced, left out, doubled, renamed or swapped."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        ways = list(places(value))
        # The top of a value is refused at once; what lies deep is where the interesting mistakes are.
        way = max(chance.choice(ways), chance.choice(ways), key=len)
        if not way:
            value = copy.deepcopy(chance.choice(evil)) if chance.random() < 0.2 else value
            continue
        *before, last = way
        holder = value
        for key in before:
            holder = holder[key]
        deed = chance.randrange(6)
        if deed == 0:
            del holder[last]
        elif deed == 1 and isinstance(holder, dict):
            holder[chance.choice(("a.b", "", "$tensor", "../x", "\x1b[0m", "__class__", "name"))] = holder.pop(last)
        elif deed == 2:
            other = value
            for key in chance.choice(ways):
                other = other[key] if _holds(other, key) else other
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = copy.deepcopy(chance.choice(evil))
    return value


def _holds(value: Any, key: Any) -> bool:
    return (
        key in value if isinstance(value, dict) else isinstance(value, list) and type(key) is int and key < len(value)
    )


def garbled(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with one to four pieces overwritten, cut out, doubled or put in."""
    garbage = (
        b"\x00", b"\xff\xff\xff\xff", b"[" * 3000, b"{" * 50, b'"', b"\\u0000", b"9" * 5000, b"-1", b"NaN", b"\x1b[31m",
        b"\x80\x04cposix\nsystem\n", b"PK\x03\x04", (2**63).to_bytes(8, "little"), b"=", b"\n", b",", b"}", b"1e999",
    )  # fmt: skip
    data = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(data) + 1)
        deed = chance.randrange(4)
        if deed == 0:
            data[place : place + chance.randrange(1, 20)] = b""
        elif deed == 1 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif deed == 2:
            data[place:place] = data[place : place + chance.randrange(1, 200)]
        else:
            data[place : place + chance.randrange(4)] = chance.choice(garbage)
    return bytes(data)


def json_bytes(value: Any) -> bytes:
    """Return JSON text, with what JSON itself does not have (nan, lone surrogates) as Python writes it."""
    return json.dumps(value).encode("ascii")


def cases(number: int) -> Callable[[Any], Any]:
    """Let hypothesis run a test `number` times, the same ones each time."""
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
