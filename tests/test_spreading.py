"""Preparation on a Ray cluster gives the files of the local one, whatever dies on the way; errors read the same."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hasten.data.corpus import CorpusSpec
from hasten.data.encoding import TextEncoder, encode_shipped, shipment
from hasten.data.preparation import prepare
from hasten.data.tokenizer import train_bpe
from hasten.errors import DataError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

# Ray stays out of the process of the tests, which forks elsewhere.
HEAD = """
import logging, sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
BEGIN = """
import json, os, signal, sys, time, warnings
warnings.simplefilter("error")
from pathlib import Path
from hasten.data import preparation
from hasten.data.corpus import CorpusSpec
from hasten.data.preparation import prepare
preparation._BATCH_CHARACTERS, preparation._SECONDS_BETWEEN_REPORTS = 500, 0
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of two cores on this machine, as the environment of who joins it."""
    folder = Path("/tmp") / f"hasten-prepare-{os.getpid()}"  # a socket's path may have no more than 107 bytes
    environment = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    folder.mkdir()
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={key: value for key, value in environment.items() if key != "RAY_ADDRESS"},
        text=True,
        start_new_session=True,
    )
    try:
        yield {**environment, "RAY_ADDRESS": head.stdout.readline().strip(), "HEAD": str(head.pid)}
    finally:
        head.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        head.stdout.close()
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def run(code: str, environment: dict[str, str]) -> list:
    """Run `code` in a process of its own; return the JSON of each line that it printed."""
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    # Ray's core says so, past all settings, when a result is gone with the worker that had it.
    said = [line for line in done.stderr.splitlines() if "Attempting to recover" not in line]
    assert (done.returncode, said) == (0, []), done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def corpora(library_text: str, tmp_path_factory: pytest.TempPathFactory) -> list[CorpusSpec]:
    """Two sources kept apart: tiny records and a file cut into blocks; the records; the file and a damaged one."""
    folder = tmp_path_factory.mktemp("corpora")
    records = [json.dumps({"text": line}) + "\n" for line in library_text[:80_000].splitlines()]
    (folder / "a.jsonl").write_text("".join(records))
    (folder / "b.txt").write_text(library_text[:60_000])
    (folder / "c.txt").write_bytes(library_text[:40_000].encode().replace(b"argument", b"\xff\0'tis"))
    a, b, c = (str(folder / name) for name in ("a.jsonl", "b.txt", "c.txt"))
    return [CorpusSpec((a, b), apart=True), CorpusSpec((a,)), CorpusSpec((b, c))]


@needs_ray
def test_ray_writes_the_files_of_the_local_engine_also_when_workers_are_killed(corpora, cluster, tmp_path):
    local = [prepare(spec, vocab_size=400, cache=tmp_path / "own") for spec in corpora]
    code = """
    import psutil
    from contextlib import suppress
    killed = []
    def kill_workers():
        # Named after the task in hand; a node ends without its agents, which are "ray::" processes too.
        for one in psutil.Process(int(os.environ["HEAD"])).children(recursive=True):
            with suppress(psutil.Error):  # it has just died
                if " ".join(one.cmdline()).startswith(("ray::IDLE", "ray::encode_shipped")):
                    one.kill()
                    killed.append(one.pid)
    def watch(progress):
        seen.append(progress)
        if progress.stage == "encoding" and progress.done_bytes and len(killed) < 2:
            kill_workers()
    import ray
    before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    for number, spec in enumerate(SPECS):
        seen = []
        data = prepare(spec, vocab_size=400, cache=Path("ray"), engine="ray", workers=2, on_progress=watch)
        print(json.dumps([str(data.folder), list(dict.fromkeys(one.stage for one in seen)), list(seen[-1].notes)]))
        assert ray.is_initialized() == (number > 0)
        if number == 0:
            assert len(killed) >= 2
            assert before == (signal.getsignal(signal.SIGTERM), dict(os.environ))
            ray.init(log_to_driver=False, logging_level="ERROR")
    """
    done = run(code.replace("SPECS", repr(corpora)), cluster)
    for (folder, stages, notes), data in zip(done, local, strict=True):
        assert Path(folder).name == data.folder.name
        assert content(Path(folder)) == content(data.folder)
        assert stages == ["reading", "learning the tokenizer", "encoding", "done"]
        assert any(note.startswith("encoded by ") for note in notes)


@needs_ray
def test_errors_and_encoders_that_differ_end_on_ray_as_they_do_here(corpora, cluster, tmp_path):
    local = prepare(corpora[1], vocab_size=400, cache=tmp_path / "own")
    code = """
    from hasten.data import spreading
    from hasten.errors import DataError
    Path("bad.jsonl").write_text("\\n".join(['{"text": "some text"}'] * 2000 + ["{"] * 100))
    import ray
    ray.init(log_to_driver=False, logging_level="ERROR")
    for engine in ("local", "ray"):
        for source, tokenizer in (("nothing.txt", "bytes"), ("bad.jsonl", "bytes"), ("bad.jsonl", "nowhere.json")):
            try:
                prepare(CorpusSpec((source,)), tokenizer=tokenizer, cache=Path(engine), engine=engine)
            except DataError as error:
                print(json.dumps(str(error)))
        assert not [path for path in Path(engine).rglob("*") if path.name != "prepared"]
    # Workers say of one text that their encoder differs.
    def sly(shipped, texts):
        from hasten.data.encoding import encode_shipped
        differs = not shipped.is_plain and any("argparse" in text for text in texts)
        return None if differs else encode_shipped(shipped, texts)
    spreading.encode_shipped = sly
    seen = []
    data = prepare(SPEC, vocab_size=400, cache=Path("sly"), engine="ray", on_progress=seen.append)
    print(json.dumps([str(data.folder), list(seen[-1].notes)]))
    """
    *said, (folder, notes) = run(code.replace("SPEC,", f"{corpora[1]!r},"), cluster)
    assert len(said) == 6
    assert said[:3] == said[3:]
    assert content(Path(folder)) == content(local.folder)
    assert any("gave other ids" in note for note in notes)


@needs_ray
def test_cluster_that_does_not_answer_is_one_sentence(corpora):
    code = """
    from hasten.errors import DataError
    try:
        prepare(SPEC, tokenizer="bytes", cache=Path("cache"), engine="ray")
    except DataError as error:
        print(json.dumps(str(error)))
    """
    (said,) = run(code.replace("SPEC", repr(corpora[0])), {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"})
    assert said.startswith("no Ray cluster can be reached or started (nobody answers at 127.0.0.1:9")
    assert "RAY_ADDRESS" in said


def test_unknown_engine_and_missing_package_are_named(corpora, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="expected 'local' or 'ray'"):
        prepare(corpora[0], tokenizer="bytes", cache=tmp_path / "cache", engine="dask")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'hasten\[ray\]'"):
        prepare(corpora[0], tokenizer="bytes", cache=tmp_path / "cache", engine="ray")


def test_shipped_encoder_gives_the_same_ids_and_refuses_another_version():
    texts = ["some text", "", "it's a\n'tis", "more of it " * 50]
    encode = TextEncoder(train_bpe(texts * 9, 300))
    for own, other in zip(encode(texts), encode_shipped(shipment(encode), texts)):
        assert own.tolist() == other.tolist()
    with pytest.raises(DataError, match="install the same version on every machine"):
        encode_shipped(shipment(encode)._replace(version="0.0.1"), texts)
