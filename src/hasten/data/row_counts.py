"""How many rows each window of documents has: counted once by packing them all, then kept in the cache.

Dimensions: W windows, K classes of row length.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hasten.cache import cache_root
from hasten.data.fitting import Packing

_VERSION = 1


@dataclass(frozen=True)
class RowCounts:
    """What packing made of every window.

    Attributes:
        rows_WK: int64, rows of each window and class.
        tokens_WK: int64, tokens in them.
        most_pieces_K: the most pieces that any row of a class holds.
        lost: tokens in no row, by cause.
        cuts: documents cut although they fit a row.
    """

    rows_WK: np.ndarray
    tokens_WK: np.ndarray
    most_pieces_K: tuple[int, ...]
    lost: Mapping[str, int] = field(default_factory=dict)
    cuts: int = 0

    @classmethod
    def of(cls, windows: Iterable[tuple[Packing, ...]]) -> RowCounts:
        """Return the counts of packed windows, of which there is at least one."""
        rows, tokens, most, lost, cuts = [], [], [], {}, 0
        for packings in windows:
            rows.append([packing.num_rows for packing in packings])
            tokens.append([packing.num_tokens for packing in packings])
            most.append([int(np.diff(packing.firsts_R1).max(initial=0)) for packing in packings])
            for packing in packings:
                cuts += packing.cuts
                for cause, count in packing.lost.items():
                    lost[cause] = lost.get(cause, 0) + count
        return cls(np.array(rows), np.array(tokens), tuple(np.max(most, axis=0).tolist()), lost, cuts)


def cached_counts(key: str) -> RowCounts | None:
    """Return the counts kept under `key`, or None."""
    try:
        content = json.loads(_path(key).read_text(encoding="utf-8"))
        is_whole = content.pop("check") == _check(content) and content["key"] == key
        counts = RowCounts(
            np.array(content["rows"], np.int64),
            np.array(content["tokens"], np.int64),
            tuple(content["most_pieces"]),
            content["lost"],
            content["cuts"],
        )
    # A cache is never a reason to stop: what cannot be read is counted again.
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return counts if is_whole else None


def keep_counts(key: str, counts: RowCounts) -> None:
    """Keep the counts under `key`; a cache that cannot be written to is left alone."""
    path = _path(key)
    content = {
        "key": key,
        "rows": counts.rows_WK.tolist(),
        "tokens": counts.tokens_WK.tolist(),
        "most_pieces": counts.most_pieces_K,
        "lost": counts.lost,
        "cuts": counts.cuts,
    }
    content["check"] = _check(content)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(json.dumps(content), encoding="utf-8")
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)


def _check(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _path(key: str) -> Path:
    digest = hashlib.sha256(f"{_VERSION} {key}".encode()).hexdigest()[:32]
    return cache_root() / "rows" / f"{digest}.json"
