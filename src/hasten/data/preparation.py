"""A corpus turned into token shards, once: the cache of prepared data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from hasten.cache import cache_root
from hasten.data import spreading
from hasten.data.corpus import BATCH_CHARACTERS, Corpus, CorpusSpec, open_corpus
from hasten.data.encoding import Spread, TextEncoder, streams
from hasten.data.progress import OnProgress, PrepareProgress, Reporter
from hasten.data.sampling import sample
from hasten.data.shards import FORMAT_VERSION, PreparedData, ShardWriter, write_manifest
from hasten.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from hasten.errors import DataError, printable

__all__ = ["OnProgress", "PrepareProgress", "prepare"]

# Part of every cache key: raise it when the same corpus and tokenizer would give other shards, or other vocabularies.
FORMAT = "hasten-prepared-1"
_BATCH_CHARACTERS = BATCH_CHARACTERS
_SECONDS_BETWEEN_REPORTS = 0.1
_SMALL_CORPUS_BYTES = 2_000_000
_ABANDONED_SECONDS = 24 * 3600


def prepare(
    spec: CorpusSpec,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    cache: Path | None = None,
    workers: int | None = None,
    engine: str = "local",
    on_progress: OnProgress | None = None,
) -> PreparedData:
    """Return the corpus as token shards, from the cache where the same content was prepared the same way before.

    The cache is addressed by content: the hash of every source file (read each time), the split and the tokenizer.
    Shards are the same whatever the engine, the number of workers and whichever encoder ran. Here text is encoded by
    threads: the encoders work outside the interpreter's lock, so they use every core, without the start-up, memory
    and main-module rules of processes. On Ray batches of text travel to the workers of a cluster: the one that this
    process is connected to, else that of RAY_ADDRESS or of `ray start`, else one of this machine for the time it takes.
    A folder appears in the cache only when it is complete.

    Args:
        spec: the text. Sources that it keeps apart become a split each, ``train-0``, ``train-1`` and so on, with
            one tokenizer, learned from all of their text as if it were joined.
        tokenizer: ``bpe`` (learned from the training side), ``bytes``, or a ``tokenizer.json`` or its folder.
        vocab_size: of a ``bpe`` tokenizer.
        cache: where prepared data lies; None: `cache_root`.
        workers: threads or tasks that encode, at least 1; None: one per core, up to 8 with a fast encoder, 16 without
            and 64 on Ray; one thread for less than 2 MB.
        engine: ``local``, or ``ray``.
        on_progress: called now and then with a PrepareProgress, and once at the end.

    Raises:
        DataError: the text, the tokenizer or the engine cannot be used, or the cache cannot be written.

    Example:
        >>> data = prepare(CorpusSpec(("python",)))  # doctest: +SKIP
        >>> data.train.num_tokens  # doctest: +SKIP
        3123456
    """
    root = Path(cache) if cache is not None else cache_root()
    tell = Reporter(on_progress, _SECONDS_BETWEEN_REPORTS)
    tell.stage("reading", None)
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; expected at least 1.")
    spreading.check_engine(engine)
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
        if engine == "local" and sum(file.bytes for file in corpus.files) < _SMALL_CORPUS_BYTES:
            workers = workers or 1
        run, times = spreading.ENGINES[engine]
        data = _build(corpus, given, folder, partial(run, workers=workers), times * _BATCH_CHARACTERS, tell)
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


def _learned(corpus: Corpus, vocab_size: int, folder: Path, tell: Reporter) -> Tokenizer:
    file = folder / f"{_key('bpe', corpus.sha256, vocab_size)}.json"
    try:
        stored = json.loads(file.read_text("utf-8"))
        if hashlib.sha256(stored["document"].encode()).hexdigest() == stored["sha256"]:
            tell.note("reused the tokenizer learned from this text before")
            return Tokenizer(stored["document"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not there, or damaged: learned again
    tell.stage("learning the tokenizer", corpus)
    val = len(corpus.train_splits)
    batches = tell.counted(corpus.batches())
    texts = sample(text for batch in batches for side, text in zip(batch.sides.tolist(), batch.texts) if side != val)
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


def _build(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, spread: Spread, characters: int, tell: Reporter
) -> PreparedData:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _write(corpus, tokenizer, unfinished, spread, characters, tell)
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


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, spread: Spread, characters: int, tell: Reporter) -> None:
    encode = TextEncoder(tokenizer)
    try:
        splits = _encode_corpus(corpus, encode, folder, spread, characters, tell)
    except _OtherIds:
        tell.note(f"{encode.name} gave other ids than the tokenizer on a part of this text, so it was not used")
        for shard in folder.iterdir():
            shard.unlink()
        splits = _encode_corpus(corpus, TextEncoder(tokenizer, is_plain=True), folder, spread, characters, tell)
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
    corpus: Corpus, encode: TextEncoder, folder: Path, spread: Spread, characters: int, tell: Reporter
) -> dict[str, dict]:
    tell.stage("encoding", corpus)
    tokenizer = encode.tokenizer
    settings = {"vocab_size": tokenizer.vocab_size, "document_token": tokenizer.document_token}
    with ExitStack() as open_files:
        writers = [open_files.enter_context(ShardWriter(folder, split, **settings)) for split in corpus.splits]
        results = open_files.enter_context(closing(spread(corpus.batches(characters), encode)))
        for batch, encoded in results:
            if encoded is None:
                raise _OtherIds
            for side, tokens, starts, source_bytes in streams(batch, encoded, tokenizer.document_token):
                writers[side].extend(tokens, starts, source_bytes=source_bytes)
            tell.read(batch)
        name = encode.name
        tell.note(
            f"encoded by {name}" + (", its ids verified against tokenizers along the text" if encode.is_fast else "")
        )
        return {split: writer.close() for split, writer in zip(corpus.splits, writers)}


def _sentences(data: PreparedData) -> list[str]:
    return list(data.manifest.get("notes", []))
