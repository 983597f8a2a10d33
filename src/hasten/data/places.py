"""Places: prepared data that lies somewhere already, in a folder or at a URL, instead of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hasten.data.corpus import CorpusSpec
from hasten.data.manifest import FORMAT, MANIFEST
from hasten.data.order import GROUP
from hasten.data.preparation import PrepareProgress
from hasten.data.range_cache import BOUND, cache_bound
from hasten.data.shard_files import token_dtype
from hasten.data.shards import PreparedData
from hasten.data.tokenizer import byte_tokenizer, load_tokenizer
from hasten.data.windows import WINDOW_TOKENS
from hasten.errors import DataError, RecipeError, one_line, printable
from hasten.files import parse_json, read_bytes

_MOST_MANIFEST_BYTES = 2 << 30
_DEFAULT_VOCAB = 4096


def prepared_place(spec: CorpusSpec) -> str | None:
    """Return the URL or the folder of prepared data that `spec` names as its text; None where it names text.

    Raises:
        RecipeError: a URL beside other text.

    Example:
        >>> prepared_place(CorpusSpec(("s3://bucket/prepared/xyz",))), prepared_place(CorpusSpec(("python",)))
        ('s3://bucket/prepared/xyz', None)
    """
    urls = [source for source in (*spec.train, *spec.val) if "://" in source]
    if urls and (len(spec.train) > 1 or spec.val):
        raise RecipeError(
            f"data={one_line(urls[0], 200)} names prepared data, which holds its own held-out text: give it alone, "
            "without other text and without data.val."
        )
    if len(spec.train) != 1 or urls:
        return urls[0] if urls else None
    folder = Path(spec.train[0]).expanduser()
    return str(folder) if _is_prepared(folder) else None


def open_prepared(
    place: str,
    spec: CorpusSpec,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = _DEFAULT_VOCAB,
    packing: str = "best_fit",
    shuffle_tokens: int | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
) -> PreparedData:
    """Return the prepared data at `place` after refusing settings that it cannot follow any more.

    Args:
        place: a folder or a URL.
        spec: how the text was to be read and split.
        tokenizer: ``bpe`` for whichever it has, else the one that it must have.
        vocab_size: of a ``bpe`` tokenizer: at least what it has, unless it is the default.
        packing, shuffle_tokens: how it will be read, for a note where the cache is too small for that.
        on_progress: called once, with the notes.

    Raises:
        RecipeError: a setting that only text could follow.
        DataError: it is no prepared data, or of another tokenizer.
    """
    plain = CorpusSpec(spec.train)
    for key in ("val", "val_share", "text_key", "separator"):
        if getattr(spec, key) != getattr(plain, key):
            raise RecipeError(
                f"data.{key} has no effect with data={one_line(place, 200)}, which is prepared: leave it out, or "
                "prepare the text anew."
            )
    data = PreparedData.open(place)
    if len(data.trains) > 1 and not spec.apart:
        raise RecipeError(
            f"{one_line(place, 200)} was prepared as a mixture of {len(data.trains)} sources: give data.weights, a "
            "number for each."
        )
    _check_tokenizer(data, tokenizer, vocab_size)
    if on_progress is not None:
        notes = (f"reads the prepared data at {printable(data.place)}", *_cramped(data, packing, shuffle_tokens))
        on_progress(PrepareProgress("reused", notes=notes))
    return data


def _check_tokenizer(data: PreparedData, tokenizer: str, vocab_size: int) -> None:
    if tokenizer == "bpe":
        if vocab_size != _DEFAULT_VOCAB and vocab_size < data.vocab_size:
            raise DataError(
                f"{printable(data.place)} was prepared with a vocabulary of {data.vocab_size}, and data.vocab_size is "
                f"{vocab_size}: leave data.vocab_size out, or prepare the text anew."
            )
        return
    given = byte_tokenizer() if tokenizer == "bytes" else load_tokenizer(tokenizer)
    if given.sha256 != data.tokenizer_sha256:
        raise DataError(
            f"{printable(data.place)} was prepared with another tokenizer than {one_line(tokenizer)}: leave "
            "data.tokenizer out, or prepare the text anew."
        )


def _cramped(data: PreparedData, packing: str, shuffle_tokens: int | None) -> list[str]:
    """Return what to say where rows are drawn from more text at a time than the cache can hold."""
    if "://" not in data.place:
        return []
    size, itemsize = data.train_size.num_tokens, token_dtype(data.vocab_size).itemsize
    mixed = len(data.trains) * (shuffle_tokens or (size if packing == "chunk" else GROUP * WINDOW_TOKENS))
    bound, wanted = cache_bound(), -(-5 * mixed * itemsize // 2_000_000)
    # Two stretches of text are in use where one passes into the next.
    if min(size, 2 * mixed) * itemsize <= bound:
        return []
    fitting = max(1 << 22, bound // itemsize // 5 * 2 // len(data.trains))
    return [
        f"rows are drawn from {min(size, mixed) * itemsize / 1e6:,.0f} MB of text at a time and the cache holds "
        f"{bound / 1e6:,.0f} MB, so text is fetched many times over: set {BOUND}={wanted}MB, or "
        f"data.shuffle_tokens={fitting} for rows from near each other"
    ]


def _is_prepared(folder: Path) -> bool:
    """Say whether a folder's manifest says that it holds prepared data."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            return False
        content = read_bytes(path, _MOST_MANIFEST_BYTES)
        if FORMAT.encode() not in content[:4096]:
            return False
        return dict(parse_json(content, len(content))).get("format") == FORMAT
    except (OSError, ValueError, TypeError):
        return False
