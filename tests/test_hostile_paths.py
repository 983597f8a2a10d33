"""Links, pipes, devices and ways out, as data and as output: refused or confined, never waited for or written to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hostile_files as hostile
import pytest
from fake_run import make_run
from fake_study import make_study
from small_runs import small_settings

from hasten.cli import main
from hasten.comparison.study import read_study as read_plan
from hasten.data.corpus import CorpusSpec, open_corpus
from hasten.data.shards import PreparedData
from hasten.data.tokenizer import load_tokenizer
from hasten.errors import RunError
from hasten.loop import train
from hasten.model import read_model
from hasten.recipe import resolve
from hasten.record import RunFolder, read_events, read_metrics, read_result
from hasten.report import write_report
from hasten.report.study import read_study

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")

SECONDS = 30.0  # of nothing happening; what is read for ever is ended by the watch in `in_time`


@contextmanager
def in_time(pipe: Path | None = None) -> Iterator[None]:
    """Fail, and not hang, where a pipe is waited for: after a while somebody opens its other end."""
    done = threading.Event()
    late: list[bool] = []

    def release() -> None:
        if not done.wait(SECONDS) and pipe is not None:
            late.append(True)
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))

    watch = threading.Thread(target=release, daemon=True)
    watch.start()
    yield
    done.set()
    watch.join()
    assert not late, "it waited for a pipe"


def tree(folder: Path) -> dict[str, str]:
    """Return every path below a folder, what it is and a hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        content = os.readlink(path).encode() if stat.S_ISLNK(kind) else b""
        content = path.read_bytes() if stat.S_ISREG(kind) else content
        found[str(path.relative_to(folder))] = f"{stat.S_IFMT(kind)} {hashlib.sha256(content).hexdigest()}"
    return found


def make_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def make_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)
        os.chdir(here)
    return path


def link_to(target: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


SPECIAL: dict[str, Callable[[Path], Path]] = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a link to zeros without end": link_to("/dev/zero"),
    "a link to chance without end": link_to("/dev/urandom"),
    "a link to a full device": link_to("/dev/full"),
    "a link to nothing": link_to("/dev/null"),
    "a link to a terminal": link_to("/dev/tty"),
    "a link to itself": lambda path: link_to(path.name)(path),
    "a link to nowhere": link_to("nowhere"),
}
every_special = pytest.mark.parametrize("what", SPECIAL)


# --- as something to read -------------------------------------------------------------------------------------------

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a text": ("text.txt", lambda path: open_corpus(CorpusSpec((str(path),)))),
    "a held-out text": ("text.txt", lambda path: open_corpus(CorpusSpec(("python",), (str(path),)))),
    "a pattern": ("text.txt", lambda path: open_corpus(CorpusSpec((f"{path.parent}/*.txt",)))),
    "a compressed text": ("text.gz", lambda path: open_corpus(CorpusSpec((str(path),)))),
    "a tokenizer": ("tokenizer.json", load_tokenizer),
    "a recipe": ("recipe.toml", lambda path: resolve(path)),
    "a manifest": ("manifest.json", lambda path: PreparedData.open(path.parent)),
    "a model's shape": ("config.json", lambda path: read_model(path.parent)),
    "a study": ("study.toml", read_plan),
    "verdicts": ("verdicts.json", lambda path: read_study(path.parent)),
}


@every_special
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_and_never_waited_for(own_folder: Path, what: str, reader: str) -> None:
    name, read = READERS[reader]
    path = SPECIAL[what](own_folder / name)
    before = tree(own_folder)
    with in_time(path if what == "a pipe" else None):
        assert hostile.met(lambda: read(path)).kind == "refused"
    assert tree(own_folder) == before


@every_special
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "events.jsonl", "recipe.toml"])
def test_a_report_leaves_out_what_is_no_file(own_folder: Path, what: str, name: str) -> None:
    make_run(own_folder / "run", steps=3)
    (own_folder / "run" / name).unlink()
    path = SPECIAL[what](own_folder / "run" / name)
    readers = {"result.json": read_result, "metrics.jsonl": read_metrics, "events.jsonl": read_events}
    with in_time(path if what == "a pipe" else None):
        hostile.met(lambda: readers.get(name, read_result)(RunFolder(own_folder / "run")))


def test_a_folder_of_text_is_read_without_what_is_no_file_in_it(own_folder: Path, library_text: str) -> None:
    folder = own_folder / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(library_text[:5000])
    for number, make in enumerate(SPECIAL.values()):
        make(folder / f"{number}.txt")
    (folder / "round").symlink_to(".", target_is_directory=True)  # a folder within itself is not gone into
    corpus = open_corpus(CorpusSpec((str(folder),)))
    assert [file.name for file in corpus.files] == ["a.txt"]


def test_weights_and_tokens_that_are_no_files_are_refused(own_folder: Path) -> None:
    from test_hostile import SHAPE
    from test_shards import some_documents, write

    from hasten.data.tokenizer import byte_tokenizer
    from hasten.exports import export
    from hasten.model import Decoder

    export(Decoder(SHAPE, seed=0).state_dict(), SHAPE, byte_tokenizer(), own_folder / "model")
    write(own_folder / "prepared", some_documents([40, 3]))
    for folder, name, read in (
        (own_folder / "model", "model.safetensors", read_model),
        (own_folder / "prepared", "train-00000.bin", lambda path: PreparedData.open(path).train.read(0, 5)),
        (own_folder / "prepared", "train-00000.idx", lambda path: PreparedData.open(path).train.read(0, 5)),
    ):
        whole = (folder / name).read_bytes()
        for what, make in SPECIAL.items():
            (folder / name).unlink()
            path = make(folder / name)
            with in_time(path if what == "a pipe" else None):
                assert hostile.met(lambda: read(folder)).kind == "refused"  # noqa: B023
        (folder / name).unlink()
        (folder / name).write_bytes(whole)


# --- as a place to write to -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paused(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Return the settings of a small run and its folder after some steps."""
    folder = tmp_path_factory.mktemp("paused")
    settings = small_settings(folder, library_text)
    train(resolve(None, [*settings, f"out={folder / 'out'}"]).recipe, until="5")
    return settings, folder / "out"


@pytest.fixture
def precious(own_folder: Path) -> Path:
    """A folder beside the run's, which nobody may touch."""
    folder = own_folder / "precious"
    (folder / "deep").mkdir(parents=True)
    (folder / "file").write_text("mine\n")
    (folder / "deep" / "model.safetensors").write_bytes(b"weights")
    return folder


ENTRIES = (
    "metrics.jsonl", "events.jsonl", "result.json", "recipe.toml", "checkpoints", "final", "tokenizer", ".lock",
    "recipe.toml.tmp", "result.json.tmp", "tokenizer.tmp", "report.html.tmp", "crashes.json",
)  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_run_folder_with_a_way_out_of_it_is_refused(
    paused: tuple[list[str], Path], own_folder: Path, precious: Path, entry: str
) -> None:
    settings, good = paused
    out = own_folder / "out"
    shutil.copytree(good, out, symlinks=True)
    before = tree(precious)
    for target in ("../precious/file", "../precious/deep", "../precious/new", "/dev/full", "/dev/zero"):
        path = out / entry
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        outcome = hostile.met(lambda: train(resolve(None, [*settings, f"out={out}"]).recipe, until="6"), most_lines=9)
        assert outcome.kind == "refused"
        assert tree(precious) == before
    path.unlink()
    with in_time(make_pipe(path)):
        refused = hostile.met(lambda: train(resolve(None, [*settings, f"out={out}"]).recipe, until="6"), most_lines=9)
    assert refused.kind == "refused"


@pytest.mark.parametrize("place", ["checkpoints/step-00000008.tmp", "checkpoints/latest.tmp", "checkpoints/latest"])
def test_a_link_among_the_checkpoints_leads_nobody_out(
    paused: tuple[list[str], Path], own_folder: Path, precious: Path, place: str
) -> None:
    settings, good = paused
    shutil.copytree(good, own_folder / "out", symlinks=True)
    (own_folder / "out" / place).unlink(missing_ok=True)
    (own_folder / "out" / place).symlink_to("../../precious/deep")
    before = tree(precious)
    hostile.met(lambda: train(resolve(None, [*settings, f"out={own_folder / 'out'}"]).recipe, until="9"))
    assert tree(precious) == before


@pytest.mark.parametrize(
    "out", ["/dev/full", "/dev/null", "/dev/zero/run", "pipe", "precious/file", "loop", "x/../pipe"]
)
def test_an_output_folder_that_is_none_is_one_sentence_and_exit_code_two(
    paused: tuple[list[str], Path], own_folder: Path, precious: Path, capfd: pytest.CaptureFixture[str], out: str
) -> None:
    make_pipe(own_folder / "pipe")
    link_to("loop")(own_folder / "loop")
    before = tree(precious)
    with in_time(own_folder / "pipe"), pytest.raises(SystemExit) as ended:
        main(["train", *paused[0], f"out={out}"])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "give another out=" in said or "put that right" in said
    assert tree(precious) == before


def test_names_that_lead_out_of_the_folder_of_runs_delete_nothing(own_folder: Path, precious: Path) -> None:
    make_run(own_folder / "runs" / "mine", steps=2)
    make_run(precious / "run", steps=2)
    (own_folder / "runs" / "linked").symlink_to(precious / "run")
    before = tree(precious)
    for name in ("..", "../precious/run", str(precious / "run"), ".", "", "linked/.."):
        with pytest.raises(SystemExit) as ended:
            main(["runs", str(own_folder / "runs"), "--remove", name, "--yes"])
        assert ended.value.code == 2
    assert tree(precious) == before
    assert (own_folder / "runs" / "mine").is_dir()


@pytest.mark.parametrize("entry", ["report.html", "report.html.tmp", "report", "forest.png", "table.md.tmp"])
def test_a_report_writes_through_no_link(own_folder: Path, precious: Path, entry: str) -> None:
    if entry.startswith("report"):
        folder = make_run(own_folder / "run", steps=3)
    else:
        folder = make_study(own_folder / "study", seeds=2, evaluations=3, lines=3)
    before = tree(precious)
    for target in ("../precious/file", "../precious/deep") if entry == "report" else ("../precious/file",):
        (folder / entry).unlink(missing_ok=True)
        (folder / entry).symlink_to(target)
        with contextlib.suppress(RunError):
            write_report([folder])
        assert tree(precious) == before


def test_a_study_names_no_runs_outside_of_it(own_folder: Path) -> None:
    folder = make_study(own_folder / "study", seeds=2, evaluations=3, lines=3)
    make_run(own_folder / "secret", steps=3)
    text = (folder / "verdicts.json").read_text()
    name = next((folder / "runs").iterdir()).name
    for way in ("../../secret", str(own_folder / "secret"), "..", "."):
        (folder / "verdicts.json").write_text(text.replace(f'"{name}"', f'"{way}"'))
        from hasten.report.trajectories import read_trajectories

        assert read_trajectories(read_study(folder), folder).unread >= 1
