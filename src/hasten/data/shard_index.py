"""The index of a shard, ``train-00000.idx``: checksums of its blocks, and where its documents start.

A header, the uint32 crc32 of every 1 MiB block of the ``.bin``, then the uint64 positions where documents start,
counted from the beginning of the shard.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 20

# Magic, tokens, documents, checksummed blocks, crc32 of the document starts.
_HEADER = struct.Struct("<8sQQQI")
_MAGIC = b"hastnix1"


def packed_index(num_tokens: int, checksums: Sequence[int], starts: Sequence[int]) -> tuple[bytes, bytes]:
    """Return the two parts of an index: header and table of checksums, and the document starts."""
    content = np.array(starts, "<u8").tobytes()
    header = _HEADER.pack(_MAGIC, num_tokens, len(starts), len(checksums), zlib.crc32(content))
    return header + np.array(checksums, "<u4").tobytes(), content


def index_bytes(num_tokens: int, num_documents: int, token_bytes: int) -> int:
    """Return the size of the ``.idx`` of a shard whose tokens take `token_bytes` each."""
    return table_bytes(num_tokens, token_bytes) + 8 * num_documents


def table_bytes(num_tokens: int, token_bytes: int) -> int:
    """Return the size of its first part, up to where the document starts begin."""
    return _HEADER.size + 4 * num_blocks(num_tokens, token_bytes)


def num_blocks(num_tokens: int, token_bytes: int) -> int:
    """Return how many blocks a shard has."""
    return -(-num_tokens * token_bytes // BLOCK_BYTES)


def read_table(table: bytes | memoryview, entry: Mapping[str, Any], token_bytes: int) -> tuple[np.ndarray, int]:
    """Return the checksums of the blocks, and that of the document starts.

    Args:
        table: the first part of the index.
        entry: of the shard in the manifest.
        token_bytes: of a token.

    Raises:
        ValueError: says how it differs from what the manifest says.
    """
    if zlib.crc32(table) != entry["index"]["crc32"]:
        raise ValueError("its table of checksums fails its own checksum")
    magic, tokens, documents, blocks, checksum = _HEADER.unpack_from(table)
    expected = (_MAGIC, entry["num_tokens"], entry["num_documents"], num_blocks(entry["num_tokens"], token_bytes))
    if (magic, tokens, documents, blocks) != expected:
        raise ValueError("it is not the index of this shard")
    return np.frombuffer(table, "<u4", offset=_HEADER.size), checksum


def read_starts(starts: bytes | memoryview, entry: Mapping[str, Any], checksum: int) -> np.ndarray:
    """Return where documents start, ``int64``: a view of `starts`, the second part of the index.

    Raises:
        ValueError: says how it differs from what its checksum and the manifest say.
    """
    if len(starts) != 8 * entry["num_documents"] or zlib.crc32(starts) != checksum:
        raise ValueError("its document starts fail their checksum")
    # No shard holds 2**63 tokens, so the stored uint64 is the same as int64.
    starts_D = np.frombuffer(starts, "<i8")
    is_inside = not len(starts_D) or (starts_D[0] >= 0 and starts_D[-1] < entry["num_tokens"])
    if not is_inside or (starts_D[1:] <= starts_D[:-1]).any():
        raise ValueError("its documents do not start one behind the other")
    return starts_D
