"""What surrounds a run is not in its result: folders that cannot be written, other clocks, locales and names."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import differences, exit_code, forked, hasten, small_settings, what_is_left

from hasten.loop import Event, train
from hasten.recipe import resolve
from hasten.record import RunFolder, read_result

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="uses fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
# A pause saves and evaluates, and leaves out the export, which would be most of the time of these tests.
PAUSE = 14


@pytest.fixture(scope="module")
def settings(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return small_settings(tmp_path_factory.mktemp("text"), library_text)


@pytest.fixture(scope="module")
def expected(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("expected") / "run"
    assert hasten("train", *settings, f"out={out}", f"--until={PAUSE}") == 0
    return what_is_left(out)


def in_child(work: Callable[[], int], log: Path) -> tuple[int, str]:
    code = exit_code(forked(work, log=log))
    return code, log.read_text(encoding="utf-8")


# A folder that cannot be written.


@pytest.fixture
def read_only(own_folder: Path) -> Iterator[Path]:
    """A folder that nobody can write into, root included."""
    folder, twin = own_folder / "disk", own_folder / "twin"
    folder.mkdir()
    twin.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs root on Linux")
    mounted = subprocess.run(["mount", "--bind", folder, twin], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    subprocess.run(["mount", "-o", "remount,bind,ro", twin], check=True)
    yield twin
    subprocess.run(["umount", "-l", twin], check=True)


def refused(settings: list[str], out: Path, own_folder: Path, prepare: Callable[[], object] = lambda: None) -> str:
    """Run where it must be refused at once, before any text is read, and return the one line that says why."""
    cache = own_folder / "cache"
    cache.mkdir()

    def work() -> int:
        os.environ["HASTEN_CACHE"] = str(cache)
        prepare()
        return hasten("train", *settings, f"out={out}")

    code, output = in_child(work, own_folder / "log")
    assert code == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("hasten: ")]
    assert len(lines) == 1, output
    assert list(cache.iterdir()) == [], "text was read before"
    return lines[0]


def test_a_read_only_disk_is_refused_at_once(settings: list[str], read_only: Path, own_folder: Path) -> None:
    assert "Read-only" in refused(settings, read_only / "runs" / "run", own_folder)


def test_a_run_on_a_disk_that_became_read_only_is_refused_at_once(
    settings: list[str], read_only: Path, own_folder: Path
) -> None:
    (own_folder / "disk" / "run").mkdir()
    assert "Read-only" in refused(settings, read_only / "run", own_folder)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="becoming another user needs root")
def test_a_folder_of_another_user_is_refused_at_once(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    own_folder.chmod(0o755)
    (own_folder / "theirs").mkdir(mode=0o755)
    (own_folder / "log").touch()
    (own_folder / "log").chmod(0o666)

    def work() -> int:
        os.environ["HASTEN_CACHE"] = str(own_folder / "theirs" / "cache")
        os.seteuid(65534)
        return hasten("train", *settings, f"out={own_folder / 'theirs' / 'run'}")

    code, output = in_child(work, own_folder / "log")
    assert code == 2, output
    assert "Traceback" not in output
    assert "ermission denied" in output


@pytest.mark.parametrize("where", ["file", "file/run", "x" * 300, "dangling"])
def test_an_output_folder_that_cannot_be_is_refused_at_once(where: str, settings: list[str], own_folder: Path) -> None:
    (own_folder / "file").touch()
    (own_folder / "dangling").symlink_to(own_folder / "file" / "nowhere")
    assert "cannot be written" in refused(settings, own_folder / where, own_folder)


def test_a_cache_that_cannot_be_written_is_one_sentence(settings: list[str], own_folder: Path) -> None:
    (own_folder / "file").touch()

    def work() -> int:
        os.environ["HASTEN_CACHE"] = str(own_folder / "file" / "cache")
        return hasten("train", *settings, f"out={own_folder / 'run'}")

    code, output = in_child(work, own_folder / "log")
    assert code == 2, output
    assert "Traceback" not in output
    assert not (own_folder / "run").exists()


def test_no_file_descriptors_left_at_the_start_is_one_sentence(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    out = own_folder / "run"

    def work() -> int:
        with contextlib.suppress(OSError):
            use_up_descriptors()
        return hasten("train", *settings, f"out={out}")

    code, output = in_child(work, own_folder / "log")
    assert code == 2, output
    assert "Traceback" not in output
    assert "open files" in output


def use_up_descriptors() -> int:
    """Let no file be opened from now on; return the limit of before."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(os.dup(0), soft), hard))
    return soft


def test_no_file_descriptors_left_for_a_while_costs_a_checkpoint_and_not_the_run(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    import resource

    out, limits = own_folder / "run", []

    def squeeze(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            limits.append(use_up_descriptors())
        if event.kind == "step" and event.step == 10:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def work() -> int:
        train(resolve(None, [*settings, f"out={out}"]).recipe, hooks=[squeeze], until=PAUSE)
        return 0

    code, output = in_child(work, own_folder / "log")
    assert code == 0, output
    assert differences(out, expected) == []


@pytest.mark.parametrize("gone", ["run", "run/checkpoints"])
def test_a_folder_that_vanishes_while_a_run_goes_damages_nothing(
    gone: str, settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    out = own_folder / "run"

    def vanish(event: Event) -> None:
        if event.kind == "step" and event.step == 6:
            os.rename(own_folder / gone, own_folder / "elsewhere")

    def work() -> int:
        train(resolve(None, [*settings, f"out={out}"]).recipe, hooks=[vanish], until=PAUSE)
        return 0

    def command() -> int:
        return hasten("train", *settings, f"out={out}", f"--until={PAUSE}")

    output = in_child(work, own_folder / "log")[1]
    assert "OSError" not in output
    assert "FileNotFoundError" not in output
    shutil.rmtree(own_folder / gone, ignore_errors=True)
    os.rename(own_folder / "elsewhere", own_folder / gone)
    assert exit_code(forked(command, log=own_folder / "log2")) == 0, (own_folder / "log2").read_text()
    assert differences(out, expected) == []


def print_to(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


def test_a_run_whose_output_is_read_no_more_goes_on(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    def work() -> int:
        print_to(writer)
        return hasten("train", *settings, f"out={own_folder / 'run'}", f"--until={PAUSE}")

    assert in_child(work, own_folder / "log")[0] == 0
    assert differences(own_folder / "run", expected) == []


def test_a_run_that_has_no_output_at_all_goes_on(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    def work() -> int:
        sys.stdout = None  # as Python has it where the shell was told >&-
        code = hasten("train", *settings, f"out={own_folder / 'run'}", f"--until={PAUSE}")
        sys.stdout = sys.stderr
        return code

    assert in_child(work, own_folder / "log")[0] == 0
    assert differences(own_folder / "run", expected) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_run_whose_log_is_on_a_full_disk_goes_on(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    def work() -> int:
        print_to(os.open("/dev/full", os.O_WRONLY))
        return hasten("train", *settings, f"out={own_folder / 'run'}", f"--until={PAUSE}")

    assert in_child(work, own_folder / "log")[0] == 0
    assert differences(own_folder / "run", expected) == []


# Other clocks, names and places.


def jumped(seconds: float) -> Callable[[], None]:
    """Return what sets every clock that a day and a date come from wrong, first by nothing, then by `seconds`."""

    def jump() -> None:
        real, asked = time.time, [0]

        def wrong() -> float:
            asked[0] += 1
            return real() + (seconds if asked[0] > 20 else 0.0)

        time.time = wrong

    return jump


def zone(name: str) -> Callable[[], None]:
    def change() -> None:
        os.environ["TZ"] = name
        time.tzset()

    return change


def spoken(name: str) -> Callable[[], None]:
    """Return what sets the locale `name`, compiled on the spot: few machines have it installed."""

    def change() -> None:
        import locale

        if name != "C":
            place = Path("locales")
            place.mkdir()
            source = ["localedef", "-i", name, "-f", "UTF-8", place / f"{name}.UTF-8"]
            subprocess.run(source, check=True, capture_output=True)
            os.environ["LOCPATH"] = str(place.absolute())
        locale.setlocale(locale.LC_ALL, "C" if name == "C" else f"{name}.UTF-8")
        assert locale.localeconv()["decimal_point"] == ("." if name == "C" else ",")

    return change


LOCALES = {"the locale C": "C", "a Turkish locale": "tr_TR", "a German locale": "de_DE"}
CHANGES: dict[str, Callable[[], object]] = {
    "a clock three hours ahead": jumped(3 * 3600),
    "a clock three hours back": jumped(-3 * 3600),
    "a clock back in 1970": jumped(-1.7e9),
    "a clock in 2100": jumped(2.5e9),
    "Kathmandu": zone("Asia/Kathmandu"),
    "the line islands": zone("Pacific/Kiritimati"),
    "a zone that is none": zone("Nowhere/At all"),
    **{title: spoken(name) for title, name in LOCALES.items()},
    "a strict umask": lambda: os.umask(0o077),
    "a low priority": lambda: os.nice(5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_clock_zone_and_locale_change_no_bit(
    change: str, settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    language = LOCALES.get(change, "C")
    if language != "C" and not (shutil.which("localedef") and Path("/usr/share/i18n/locales", language).exists()):
        pytest.skip(f"the sources of the locale {language} are not here")

    def work() -> int:
        CHANGES[change]()
        return hasten("train", *settings, f"out={own_folder / 'run'}", f"--until={PAUSE}")

    code, output = in_child(work, own_folder / "log")
    assert code == 0, output
    assert differences(own_folder / "run", expected) == []


NAMES = {
    "spaces": "a folder  with spaces",
    "scripts": "Zürich 東京 дом",
    "emoji": "🏃🏽 run",
    "shell": "a';$(touch x)&b",
    "control": "line\nbreak\x1b[31m",
    "dashes": "--out",
    "255 bytes": "n" * 255,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_folders_and_files_change_no_bit(
    name: str, settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    """The run, its text and the working directory have the name; the text is found by a relative path."""
    place = own_folder / NAMES[name]
    place.mkdir()
    words = settings[2:]
    for word in settings[:2]:
        key, _, path = word.partition("=")
        shutil.copy(path, place / Path(path).name)
        words += [f"{key}={Path(path).name}"]

    def work() -> int:
        os.chdir(place)
        return hasten("train", *words, f"out={NAMES[name]}", f"--until={PAUSE}")

    code, output = in_child(work, own_folder / "log")
    assert code == 0, output
    assert "\x1b[31m" not in output
    assert differences(place / NAMES[name], expected) == []


def test_a_name_that_is_no_text_is_refused_in_one_sentence(
    settings: list[str], expected: dict[str, Any], own_folder: Path
) -> None:
    """A recipe is a text file, which such a name cannot be written into."""
    out = os.fsdecode(bytes(own_folder) + b"/caf\xe9")
    code, output = in_child(lambda: hasten("train", *settings, f"out={out}"), own_folder / "log")
    assert code == 2, output
    assert "hasten: out=" in output
    assert "Traceback" not in output


def test_an_optimised_interpreter_that_writes_ascii_only_ends_a_run_with_the_same_bits(
    settings: list[str], own_folder: Path
) -> None:
    """With another hash seed, directory and C library locale: a process of its own, for what is fixed at its start."""
    assert hasten("train", "--no-report", *settings, f"out={own_folder / 'plain'}") == 0
    os.mkdir("elsewhere")
    changed = {
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "TZ": "Australia/Eucla",
    }
    out = own_folder / "ünlike"
    command = [sys.executable, "-OO", "-m", "hasten", "train", "--no-report", *settings, f"out={out}"]
    done = subprocess.run(command, env=os.environ | changed, cwd="elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert differences(out, what_is_left(own_folder / "plain")) == []
    assert read_result(RunFolder(out))["status"] == "finished"
