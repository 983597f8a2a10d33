"""Documents: what rows are made from, whatever holds it.

A corpus is one stream of tokens, documents back to back. What is asked of it is where documents begin, for a window of
them at a time, and spans of its tokens.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from hasten.data.shard_files import spread, token_dtype
from hasten.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

COLUMN = "input_ids"  # what tokenized text is called in a `datasets.Dataset`
_BATCH_DOCUMENTS = 10_000


@runtime_checkable
class Documents(Protocol):
    """A stream of documents. `hasten.data.shards.TokenShards` is one; `documents_of` makes one.

    Attributes:
        num_documents: documents in the stream; some may be empty.
        num_tokens: length of the stream, document tokens included.
        document_token: the token that begins every document, or None where they have none in common. Without it
            nothing says where a document ends but its own last token, which then predicts nothing.
        fingerprint: the same only for the same stream.
    """

    num_documents: int
    num_tokens: int
    document_token: int | None

    @property
    def fingerprint(self) -> str:
        """The same only for the same stream."""
        ...

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Return where documents `first` up to `stop` begin and where the last ends: int64 of one more than those."""
        ...

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return the spans of `lengths_P` tokens, at least 1 each, that begin at `starts_P`, one behind the other."""
        ...


class DocumentPart(NamedTuple):
    """What a row holds of a document.

    Attributes:
        source: which of a mixture's sources the document is in; empty where there is one.
        document: its number in the stream of the source, from 0.
        begin: its token that comes first here; its document token, where it has one, is number 0.
        tokens: how many follow each other from there.
    """

    source: str
    document: int
    begin: int
    tokens: int


def parts_of(documents: Documents, start: int, length: int) -> list[DocumentPart]:
    """Return which documents the `length` tokens from `start` of a stream belong to, in order.

    Found by bisection, so reading a few document starts whatever the number of documents.

    Example:
        >>> documents = ArrayDocuments(np.array([5, 6, 7, 8]), np.array([0, 2, 2, 4]))
        >>> [(part.document, part.begin, part.tokens) for part in parts_of(documents, 1, 2)]
        [(0, 1, 1), (2, 0, 1)]
    """
    first, last = _document_at(documents, start), _document_at(documents, start + length - 1)
    parts = []
    for begin in range(first, last + 1, _BATCH_DOCUMENTS):
        starts = documents.starts(begin, min(begin + _BATCH_DOCUMENTS, last + 1))
        lows, highs = np.maximum(starts[:-1], start), np.minimum(starts[1:], start + length)
        for number in np.flatnonzero(lows < highs).tolist():
            low, high = int(lows[number]), int(highs[number])
            parts.append(DocumentPart("", begin + number, low - int(starts[number]), high - low))
    return parts


def _document_at(documents: Documents, place: int) -> int:
    """Return which document holds the token at `place`: the last one that begins there or before."""
    low, high = 0, documents.num_documents
    while high - low > 1:
        middle = (low + high) // 2
        if int(documents.starts(middle, middle)[0]) <= place:
            low = middle
        else:
            high = middle
    return low


class ArrayDocuments:
    """Documents in memory: one array of tokens, and where each document begins.

    Args:
        tokens_N: the stream, whole numbers of at least 0.
        starts_D1: where each document begins, then the length of the stream; not descending.
        document_token: the token that begins every document, or None.

    Raises:
        DataError: the starts are not those of documents in the stream, or a document begins with another token.

    Example:
        >>> documents = ArrayDocuments(np.array([5, 6, 7]), np.array([0, 2, 3]))
        >>> documents.pieces(np.array([2, 0]), np.array([1, 2])).tolist()
        [7, 5, 6]
    """

    def __init__(self, tokens_N: np.ndarray, starts_D1: np.ndarray, *, document_token: int | None = None) -> None:
        starts_D1 = np.asarray(starts_D1, np.int64)
        if starts_D1[:1].tolist() + starts_D1[-1:].tolist() != [0, len(tokens_N)] or (np.diff(starts_D1) < 0).any():
            raise DataError(
                f"The starts of documents have to rise from 0 to the {len(tokens_N)} tokens of the stream; got "
                f"{starts_D1.tolist() if len(starts_D1) < 8 else [*starts_D1[:3].tolist(), '...', int(starts_D1[-1])]}."
            )
        firsts = tokens_N[starts_D1[:-1][np.diff(starts_D1) > 0]]
        if document_token is not None and (firsts != document_token).any():
            raise DataError(
                f"Every document has to begin with the document token {document_token}, and one begins with "
                f"{firsts[firsts != document_token][0]}: use documents_of, which puts it there."
            )
        self.num_documents, self.num_tokens = len(starts_D1) - 1, len(tokens_N)
        self.document_token = document_token
        self._tokens_N, self._starts_D1 = tokens_N, starts_D1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens and of where documents start."""
        digest = hashlib.sha256(f"{self.document_token} {self._tokens_N.dtype.str} {self.num_documents} ".encode())
        digest.update(np.ascontiguousarray(self._starts_D1))
        digest.update(np.ascontiguousarray(self._tokens_N))
        return digest.hexdigest()[:32]

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Return where documents `first` up to `stop` begin and where the last of them ends, int64."""
        return self._starts_D1[first : stop + 1]

    def pieces(self, starts_P: np.ndarray, lengths_P: np.ndarray) -> np.ndarray:
        """Return the spans of `lengths_P` tokens that begin at `starts_P`, one behind the other."""
        return self._tokens_N[spread(starts_P, lengths_P)]


def documents_of(
    source: Documents | Dataset | Sequence[Any], *, document_token: int | None = None, column: str = COLUMN
) -> Documents:
    """Return `source` as documents.

    Token shards are read from disk as they are needed. Anything else is copied once into one array of 2 or 4 bytes a
    token, which workers share; prepare shards from what is larger than memory.

    Args:
        source: documents already; a `datasets.Dataset` with a column of token ids; or a sequence of documents, each a
            sequence or an array of token ids.
        document_token: put in front of every document that does not begin with it, so that a model learns to begin
            and to end one; for most tokenizers the token of the beginning or the end of a text (``eos_token_id``).
            None leaves documents as they are: the last token of each is then predicted, but predicts nothing.
        column: of the `datasets.Dataset`.

    Raises:
        DataError: no documents, no such column, or token ids that are none.

    Example:
        >>> documents = documents_of([[5, 6], [7]], document_token=0)
        >>> documents.starts(0, 2).tolist(), documents.pieces(np.array([0]), np.array([5])).tolist()
        ([0, 3, 5], [0, 5, 6, 0, 7])
    """
    if isinstance(source, Documents):
        if document_token is not None and document_token != source.document_token:
            raise DataError(
                f"document_token={document_token} was given for documents that begin with {source.document_token}: "
                "leave it out."
            )
        return source
    if document_token is not None and document_token < 0:
        raise DataError(f"document_token={document_token} is no token id; give at least 0, or leave it out.")
    # Who holds a dataset has imported its package.
    package = sys.modules.get("datasets")
    if package is not None and isinstance(source, package.Dataset):
        parts = _columns(source, column)
    else:
        parts = _sequences(source)
    return _joined(parts, document_token)


def _columns(dataset: Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and lengths of many documents at a time, from the dataset's own arrays."""
    if column not in dataset.column_names:
        raise DataError(
            f"The dataset has no column {column!r}, but {', '.join(dataset.column_names)}: tokenize it first."
        )
    import pyarrow.types

    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH_DOCUMENTS):
        lists = table.column(column).combine_chunks()
        is_list = pyarrow.types.is_list(lists.type) or pyarrow.types.is_large_list(lists.type)
        if not is_list or not pyarrow.types.is_integer(lists.type.value_type):
            raise DataError(
                f"The column {column!r} of the dataset holds {lists.type}, not lists of token ids: tokenize it."
            )
        if lists.null_count:
            raise DataError(f"A document in the column {column!r} of the dataset is null: filter such rows out.")
        lengths = np.asarray(lists.value_lengths(), np.int64)
        yield lists.flatten().to_numpy(zero_copy_only=False), lengths


def _sequences(source: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and length of one document at a time."""
    for number, document in enumerate(source):
        tokens = np.asarray(document)
        if tokens.ndim != 1:
            raise DataError(
                f"Document {number} has the type {type(document).__name__} and is no sequence of token ids: give a "
                "list of documents, each a list of whole numbers."
            )
        yield tokens if tokens.size else tokens.astype(np.int64), np.array([tokens.size])


def _joined(parts: Iterable[tuple[np.ndarray, np.ndarray]], document_token: int | None) -> ArrayDocuments:
    """Return all documents in one array, each beginning with the document token if there is one."""
    kept, lengths, largest, before = [], [], document_token or 0, 0
    for tokens, lengths_D in parts:
        if tokens.dtype.kind not in "iu" or (tokens.size and int(tokens.min()) < 0):
            what = f"the id {tokens.min()}" if tokens.dtype.kind in "iu" else f"values of the type {tokens.dtype}"
            raise DataError(f"After document {before} there is {what}; token ids are whole numbers of at least 0.")
        largest = max(largest, int(tokens.max(initial=0)))
        if document_token is not None:
            tokens, lengths_D = _begun(tokens, lengths_D, document_token)
        if largest >= 1 << 32:
            raise DataError(f"The token id {largest} is above 4294967295: no vocabulary is that large.")
        kept.append(tokens.astype(token_dtype(largest + 1)))  # a small copy; ids of the whole may need a wider one
        lengths.append(lengths_D)
        before += len(lengths_D)
    if not before:
        raise DataError("There are no documents; give at least one.")
    starts_D1 = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    tokens_N = np.empty(int(starts_D1[-1]), token_dtype(largest + 1))
    done = 0
    for part in kept:
        tokens_N[done : done + len(part)] = part
        done += len(part)
    return ArrayDocuments(tokens_N, starts_D1, document_token=document_token)


def _begun(tokens: np.ndarray, lengths_D: np.ndarray, document_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents with the document token in front of those that do not begin with it."""
    starts_D = np.cumsum(lengths_D) - lengths_D
    lacks_D = lengths_D == 0
    lacks_D[~lacks_D] = tokens[starts_D[~lacks_D]] != document_token
    return np.insert(tokens, starts_D[lacks_D], document_token), lengths_D + lacks_D
