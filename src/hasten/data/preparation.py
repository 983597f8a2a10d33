"""A corpus turned into token shards, once: the cache of prepared data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.cache import cache_root
from hasten.data import encoders
from hasten.data.corpus import Corpus, CorpusSpec, Piece, Split, open_corpus
from hasten.data.sampling import sample
from hasten.data.shards import FORMAT_VERSION, PreparedData, ShardWriter, write_manifest
from hasten.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from hasten.errors import DataError, printable

# Part of every cache key: raise it when the same corpus and tokenizer would give other shards, or other vocabularies.
FORMAT = "hasten-prepared-1"
_BATCH_CHARACTERS = 1 << 18
_SMALL_CORPUS_BYTES = 2_000_000
_CHECKED_CHARACTERS = 1 << 10  # of every batch: 4 % of the time where the encoder is ten times as fast
# A thread holds about 23 MB with kitoken and 12 MB with tokenizers, and eight of the former wait for the one reader.
_MOST_WORKERS, _MOST_FAST_WORKERS = 16, 8
_SECONDS_BETWEEN_REPORTS = 0.1
_ABANDONED_SECONDS = 24 * 3600

OnProgress = Callable[["PrepareProgress"], None]


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is.

    Attributes:
        stage: "reading", "learning the tokenizer", "encoding", and at the end "done" or "reused".
        done_bytes: bytes of the source files (as on disk) that the stage has read.
        total_bytes: what it will read.
        megabytes_per_second: text per second in this stage; None at its beginning.
        seconds_left: of this stage; None at its beginning.
        notes: at the end, sentences for the user: what was reused, which encoder ran, what was replaced in the text.
    """

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0
    megabytes_per_second: float | None = None
    seconds_left: float | None = None
    notes: tuple[str, ...] = ()


def prepare(
    spec: CorpusSpec,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    cache: Path | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> PreparedData:
    """Return the corpus as token shards, from the cache where the same content was prepared the same way before.

    The cache is addressed by content: the hash of every source file (read each time), the split and the tokenizer.
    Shards are the same whatever the number of workers and whichever encoder ran. Text is encoded by threads: the
    encoders work outside the interpreter's lock, so they use every core, without the start-up, memory and
    main-module rules of processes. A folder appears in the cache only when it is complete.

    Args:
        spec: the text. Sources that it keeps apart become a split each, ``train-0``, ``train-1`` and so on, with
            one tokenizer, learned from all of their text as if it were joined.
        tokenizer: ``bpe`` (learned from the training side), ``bytes``, or a ``tokenizer.json`` or its folder.
        vocab_size: of a ``bpe`` tokenizer.
        cache: where prepared data lies; None: `cache_root`.
        workers: threads that encode, at least 1; None: one per core, up to 8 with a fast encoder and 16 without;
            one for less than 2 MB.
        on_progress: called now and then with a PrepareProgress, and once at the end.

    Raises:
        DataError: the text or the tokenizer cannot be used, or the cache cannot be written.

    Example:
        >>> data = prepare(CorpusSpec(("python",)))  # doctest: +SKIP
        >>> data.train.num_tokens  # doctest: +SKIP
        3123456
    """
    root = Path(cache) if cache is not None else cache_root()
    tell = _Reporter(on_progress)
    tell.stage("reading", None)
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; expected at least 1.")
    given = _given_tokenizer(tokenizer)
    corpus = open_corpus(spec)
    choice = f"bpe {vocab_size}" if given is None else f"{given.sha256} {given.document_token}"
    key = _key(corpus.sha256, choice, FORMAT_VERSION)
    folder = root / "prepared" / key
    try:
        if (data := _cached(folder)) is not None:
            tell.finish("reused", [f"reused the prepared data of {corpus.name}", *_sentences(data)])
            return data
        if given is None:
            given = _learned(corpus, vocab_size, root / "tokenizers", tell)
        data = _build(corpus, given, folder, workers, tell)
    except OSError as error:
        raise DataError(
            f"prepared data cannot be written to {printable(str(root))} ({error.strerror or error}); "
            "make room there, or name another folder with HASTEN_CACHE."
        ) from error
    tell.finish("done", _sentences(data))
    return data


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join([FORMAT, *map(str, parts)]).encode()).hexdigest()[:40]


def _given_tokenizer(choice: str) -> Tokenizer | None:
    if choice == "bpe":
        return None
    return byte_tokenizer() if choice == "bytes" else load_tokenizer(choice)


def _default_workers(corpus: Corpus, most: int) -> int:
    if sum(file.bytes for file in corpus.files) < _SMALL_CORPUS_BYTES:
        return 1
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(cores), most)


def _cached(folder: Path) -> PreparedData | None:
    if not folder.is_dir():
        return None
    try:
        return PreparedData.open(folder)
    except DataError:
        # Damaged from outside: what is addressed by content can always be made again.
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        folder.rename(aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
        return None


def _learned(corpus: Corpus, vocab_size: int, folder: Path, tell: _Reporter) -> Tokenizer:
    file = folder / f"{_key('bpe', corpus.sha256, vocab_size)}.json"
    try:
        stored = json.loads(file.read_text("utf-8"))
        if hashlib.sha256(stored["document"].encode()).hexdigest() == stored["sha256"]:
            tell.note("reused the tokenizer learned from this text before")
            return Tokenizer(stored["document"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there, or damaged: learned again
    tell.stage("learning the tokenizer", corpus)
    texts = sample(tell.counted(piece for side, piece in corpus.sides() if side != "val"))
    tokenizer = train_bpe(texts, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".tmp", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump({"sha256": tokenizer.sha256, "document": tokenizer.document}, stream)
        os.replace(unfinished, file)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return tokenizer


def _build(corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int | None, tell: _Reporter) -> PreparedData:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _write(corpus, tokenizer, unfinished, workers, tell)
        unfinished.chmod(0o777 & ~_umask())
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process has finished the same preparation: equal content, so its folder serves.
            data = _cached(folder)
            if data is None:
                raise
            return data
        return PreparedData.open(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob("*.tmp"):
        try:
            newest = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
        except OSError:
            continue
        if time.time() - newest > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int | None, tell: _Reporter) -> None:
    name, encode = encoders.fastest(tokenizer)
    try:
        splits = _encode_corpus(corpus, tokenizer, encode, name, folder, workers, tell)
    except _OtherIds:
        tell.note(f"{name} gave other ids than the tokenizer on a part of this text, so it was not used")
        for shard in folder.iterdir():
            shard.unlink()
        splits = _encode_corpus(corpus, tokenizer, tokenizer.encode, "tokenizers", folder, workers, tell)
    tokenizer.save(folder)
    write_manifest(
        folder,
        splits=splits,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        document_token=tokenizer.document_token,
        sources=[{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in corpus.files],
        counts=dict(sorted(corpus.counts.amounts.items())),
        notes=corpus.counts.sentences(),
        **({"train_names": list(corpus.names)} if corpus.spec.apart else {}),
    )


class _OtherIds(Exception):
    """A fast encoder differs from its tokenizer."""


def _encode_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    encode: encoders.Encode,
    name: str,
    folder: Path,
    workers: int | None,
    tell: _Reporter,
) -> dict[str, dict]:
    is_fast = name not in ("tokenizers", "bytes")

    def encode_batch(batch: list[tuple[Split, Piece]]) -> list[np.ndarray]:
        beginning = batch[0][1].text[:_CHECKED_CHARACTERS]
        if is_fast and encoders.disagrees(encode, tokenizer, [beginning]):
            raise _OtherIds
        return [encode(piece.text) for _, piece in batch]

    workers = workers or _default_workers(corpus, _MOST_FAST_WORKERS if is_fast else _MOST_WORKERS)
    tell.stage("encoding", corpus)
    settings = {"vocab_size": tokenizer.vocab_size, "document_token": tokenizer.document_token}
    with ExitStack() as open_files:
        writers = {
            split: open_files.enter_context(ShardWriter(folder, split, **settings))
            for split in (*corpus.train_splits, "val")
        }
        for batch, tokens_of in _in_order(_batches(corpus), encode_batch, workers):
            for (side, piece), tokens in zip(batch, tokens_of):
                if piece.starts_document:
                    writers[side].start_document()
                writers[side].append(tokens, source_bytes=piece.source_bytes)
                tell.read(piece)
        tell.note(f"encoded by {name}" + (", its ids verified against tokenizers along the text" if is_fast else ""))
        return {side: writer.close() for side, writer in writers.items()}


def _batches(corpus: Corpus) -> Iterator[list[tuple[Split, Piece]]]:
    batch, size = [], 0
    for side, piece in corpus.sides():
        batch.append((side, piece))
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(batches: Iterator[list], work: Callable, workers: int) -> Iterator[tuple[list, list]]:
    """Yield each batch with its result, in order; a batch per worker and two more are held."""
    if workers == 1:
        for batch in batches:
            yield batch, work(batch)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="hasten-encode")
    waiting: deque[tuple[list, Future]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > workers + 1:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _sentences(data: PreparedData) -> list[str]:
    return list(data.manifest.get("notes", []))


class _Reporter:
    """Turns what is read into a PrepareProgress now and then."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._notes: list[str] = []

    def note(self, sentence: str) -> None:
        self._notes.append(sentence)

    def stage(self, name: str, corpus: Corpus | None) -> None:
        self._stage, self._corpus = name, corpus
        self._total = sum(file.bytes for file in corpus.files) if corpus else 0
        self._text_bytes, self._start, self._last = 0, time.monotonic(), float("-inf")
        self._send()

    def counted(self, pieces: Iterator[Piece]) -> Iterator[str]:
        for piece in pieces:
            self.read(piece)
            yield piece.text

    def read(self, piece: Piece) -> None:
        self._text_bytes += piece.source_bytes
        if self._on_progress and time.monotonic() - self._last >= _SECONDS_BETWEEN_REPORTS:
            self._send()

    def finish(self, stage: str, sentences: list[str]) -> None:
        self._notes.extend(sentences)
        if self._on_progress:
            total = self._total
            self._on_progress(PrepareProgress(stage, total, total, notes=tuple(map(printable, self._notes))))

    def _send(self) -> None:
        if self._on_progress is None:
            return
        now = time.monotonic()
        self._last, seconds = now, now - self._start
        done = min(self._corpus.bytes_read, self._total) if self._corpus and self._text_bytes else 0
        speed = self._text_bytes / 1e6 / seconds if done and seconds > 0 else None
        left = seconds * (self._total - done) / done if done else None
        self._on_progress(PrepareProgress(self._stage, done, self._total, speed, left))
