"""File formats read as a flat stream of (document, text) fragments."""

from __future__ import annotations

import codecs
import importlib
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from hasten.data import compressed, counts
from hasten.data.counts import Counts
from hasten.data.sources import READ_BYTES, SourceFile
from hasten.errors import DataError, nearest, printable

# A record is parsed whole, so its size bounds memory: as text it may take four bytes a character, twice over.
MAX_RECORD_BYTES = 32 << 20
MAX_BAD_SHARE = 0.01
_EARLY_LINES, _EARLY_SHARE = 1000, 0.5


def fragments(file: SourceFile, *, text_key: str, separator: str | None, tally: Counts) -> Iterator[tuple[str, str]]:
    """Yield (document, text): fragments with the same document name follow each other and belong together.

    Bytes that are not UTF-8 arrive as the surrogates of `surrogateescape`. An empty document is one fragment
    without text.

    Args:
        file: what to read; suffixes of its name choose decompression and format.
        text_key: field or column of records that holds the text.
        separator: in plain text, what stands between documents; None: the file is one document.
        tally: counts records that cannot be used.

    Raises:
        DataError: the file is damaged, changed since it was hashed, or most of its records cannot be used.
    """
    name = compressed.stem(file.name).lower()
    if name.endswith((".jsonl", ".ndjson")):
        yield from _json_lines(file, text_key, tally)
    elif name.endswith(".json"):
        yield from _json_values(file, text_key, tally)
    elif name.endswith(".parquet"):
        yield from _parquet(file, text_key, tally)
    elif separator:
        yield from _separated(file.name, _text_chunks(file, tally), separator)
    else:
        yield file.name, ""
        for chunk in _text_chunks(file, tally):
            yield file.name, chunk
    file.check_unchanged()


def is_one_document(file: SourceFile, separator: str | None) -> bool:
    """Say whether the whole file is a single document."""
    records = compressed.stem(file.name).lower().endswith((".jsonl", ".ndjson", ".json", ".parquet"))
    return not records and not separator


def _text_chunks(file: SourceFile, tally: Counts) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    at_start = True
    with compressed.open_stream(file.path, file.name, tally.on_read) as stream:
        while block := stream.read(READ_BYTES):
            text = decoder.decode(block)
            if at_start and text:
                at_start = False
                if text[0] == "\ufeff":
                    tally.add(counts.BYTE_ORDER_MARKS, file.name)
                    text = text[1:]
            yield text
    yield decoder.decode(b"", final=True)


def _separated(name: str, chunks: Iterator[str], separator: str) -> Iterator[tuple[str, str]]:
    index, held = 0, ""
    for chunk in chunks:
        *ended, held = (held + chunk).split(separator)
        for text in ended:
            yield f"{name}:{index}", text
            index += 1
        # The last characters may be the beginning of a separator, and most documents are shorter than a chunk.
        if len(held) > READ_BYTES:
            safe = max(0, len(held) - len(separator) + 1)
            yield f"{name}:{index}", held[:safe]
            held = held[safe:]
    yield f"{name}:{index}", held


def _text_of(value: Any, text_key: str) -> str:
    """Return the text of one record, or raise ValueError that says in a few words what is wrong with it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"neither an object nor a text but {_kind(value)}")
    if text_key not in value:
        keys = ", ".join(repr(key) for key in list(value)[:5]) or "none"
        raise ValueError(f"no key {text_key!r} (keys: {keys}){nearest(text_key, value)}")
    text = value[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is not text but {_kind(text)}")
    return text


def _refuse_twice(record: str, text_key: str) -> None:
    """Raise ValueError if the record itself has the key more than once: which text is meant is anyone's guess."""
    keys: list[str] = []
    # Of all objects in a record it is the outermost that is complete last.
    json.loads(record, object_pairs_hook=lambda pairs: keys.__setitem__(slice(None), [key for key, _ in pairs]))
    if keys.count(text_key) > 1:
        raise ValueError(f"the key {text_key!r} {keys.count(text_key)} times")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a number")


def _json_lines(file: SourceFile, text_key: str, tally: Counts) -> Iterator[tuple[str, str]]:
    quoted_key = json.dumps(text_key, ensure_ascii=False)
    lone = re.compile(rf'^{{{re.escape(quoted_key)}: ?"({_STRING})"}}\r?\n', re.MULTILINE)
    with compressed.open_stream(file.path, file.name, tally.on_read) as stream:
        number = 0
        while ahead := stream.peek():
            left = ahead.rfind(b"\n") + 1
            if texts := _lone_texts(ahead[:left], lone):
                stream.read(left)
                tally.records_read += len(texts)
                yield from ((f"{file.name}:{place}", text) for place, text in enumerate(texts, number + 1))
                number += len(texts)
                continue
            left = max(left, 1)
            while left > 0 and (line := stream.readline(MAX_RECORD_BYTES + 1)):
                number, left = number + 1, left - len(line)
                text = _line_text(file, line, number, stream, text_key, quoted_key, tally)
                if text is not None:
                    yield f"{file.name}:{number}", text


_TINY_RECORD = 4096  # bytes: of longer ones the parsing is not what costs
# What stands between the quotes of a JSON text.
_STRING = r'[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*'


def _lone_texts(lines: bytes, lone: re.Pattern[str]) -> list[str]:
    """Return the texts of whole lines where each is a record of the text alone, as tiny ones often are; else nothing.

    A fifth of the time of parsing each, and the same texts: what has escapes goes through the library's own scanner.
    """
    if len(lines) > _TINY_RECORD * lines.count(b"\n"):
        return []
    block = lines.decode("utf-8", "surrogateescape")
    if not lone.match(block):
        return []
    texts = lone.findall(block)
    if len(texts) != block.count("\n"):
        return []
    if "\\" not in block:
        return texts
    try:
        return [json.decoder.scanstring(text + '"', 0, True)[0] if "\\" in text else text for text in texts]
    except ValueError:
        return []


def _line_text(
    file: SourceFile, line: bytes, number: int, stream: io.BufferedIOBase, text_key: str, quoted_key: str, tally: Counts
) -> str | None:
    """Return the text of a line, or None where it is blank or cannot be used, which is counted."""
    if number == 1 and line.startswith(codecs.BOM_UTF8):
        tally.add(counts.BYTE_ORDER_MARKS, file.name)
        line = line[3:]
    if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
        tally.records_read += 1
        _skip_line(stream)
        _reject(tally, f"{file.name} line {number}", f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        return None
    if not line.strip():
        return None
    tally.records_read += 1
    try:
        record = line.decode("utf-8", "surrogateescape")
        text = _text_of(json.loads(record), text_key)
        if record.count(quoted_key) > 1:
            _refuse_twice(record, text_key)
    except RecursionError:
        _reject(tally, f"{file.name} line {number}", "nested too deeply")
    except ValueError as error:
        _reject(tally, f"{file.name} line {number}", str(error))
    else:
        return text
    return None


def _skip_line(stream: io.BufferedIOBase) -> None:
    while (part := stream.readline(READ_BYTES)) and not part.endswith(b"\n"):
        pass


def _reject(tally: Counts, place: str, reason: str) -> None:
    tally.add(counts.BAD_RECORD, f"{place}: {reason}")
    bad = tally.amounts[counts.BAD_RECORD]
    if tally.records_read >= _EARLY_LINES and bad > _EARLY_SHARE * tally.records_read:
        raise bad_records(tally)


def bad_records(tally: Counts) -> DataError:
    """Return the error that names how many records cannot be used, and the first five."""
    bad, read = tally.amounts[counts.BAD_RECORD], tally.records_read
    return DataError(
        f"{bad} of {read} JSON records cannot be used, more than {MAX_BAD_SHARE:.0%}: {tally.show(counts.BAD_RECORD)}; "
        "correct them, or name the field that holds the text with data.text_key=KEY."
    )


def check_records(tally: Counts) -> None:
    """Raise DataError when more than 1 % of the records that were read cannot be used."""
    if tally.amounts.get(counts.BAD_RECORD, 0) > MAX_BAD_SHARE * tally.records_read:
        raise bad_records(tally)


def _json_values(file: SourceFile, text_key: str, tally: Counts) -> Iterator[tuple[str, str]]:
    """Read a .json file: an array of records, or records one after another; one record is held at a time."""
    for index, value in enumerate(_json_stream(file, _text_chunks(file, tally))):
        tally.records_read += 1
        try:
            text = _text_of(value, text_key)
        except ValueError as error:
            _reject(tally, f"{file.name} record {index}", str(error))
        else:
            yield f"{file.name}:{index}", text


_BLANKS = re.compile(r"[ \t\r\n]*")


def _json_stream(file: SourceFile, chunks: Iterator[str]) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    held, at = "", 0
    in_array, ended, started = False, False, False
    arrived: list[str] = []
    for chunk in chain(chunks, [None]):
        at_end = chunk is None
        arrived.append(chunk or "")
        # A long record is parsed again only when what is held has doubled, so a few times rather than often.
        if not at_end and sum(map(len, arrived)) < len(held) - at:
            continue
        held, at = held[at:] + "".join(arrived), 0
        arrived.clear()
        while (at := _BLANKS.match(held, at).end()) < len(held):
            if ended:
                raise _broken(file, "text after the closing bracket")
            if not started:
                started = True
                if held[at] == "[":
                    in_array, at = True, at + 1
                    continue
            if in_array and held[at] == "]":
                ended, at = True, at + 1
                continue
            try:
                value, stop = decode(held, at)
            except RecursionError as error:
                raise _broken(file, "nested too deeply") from error
            except ValueError as error:
                if at_end or len(held) - at > MAX_RECORD_BYTES:
                    raise _broken(file, str(error)) from error
                break
            stop = _BLANKS.match(held, stop).end()
            if in_array:
                if stop == len(held) and not at_end:
                    break  # what follows the value, a comma or a bracket, has not arrived yet
                if held[stop : stop + 1] not in (",", "]"):
                    raise _broken(file, "no comma between two records, or no closing bracket")
                stop += held[stop] == ","
            yield value
            at = stop
    if in_array and not ended:
        raise _broken(file, "no closing bracket")


def _broken(file: SourceFile, reason: str) -> DataError:
    return DataError(f"{printable(file.name)} is not valid JSON ({printable(reason)}); correct it, or use .jsonl.")


def _parquet(file: SourceFile, text_key: str, tally: Counts) -> Iterator[tuple[str, str]]:
    if file.name != compressed.stem(file.name):
        raise DataError(f"{printable(file.name)} is compressed twice; Parquet compresses inside: decompress it.")
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"{printable(file.name)} is a Parquet file, which needs one more package: `pip install pyarrow`."
        ) from error
    tally.on_read(file.bytes)
    try:
        with parquet.ParquetFile(file.path, memory_map=False, buffer_size=READ_BYTES) as table:
            _check_column(file, table.schema_arrow, text_key)
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=[text_key], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield f"{file.name}:{number}", value or ""
                    number += 1
    except (arrow.ArrowException, OSError) as error:
        reason = printable(str(error)).splitlines()[0]
        raise DataError(f"{printable(file.name)} is not a readable Parquet file ({reason}); fetch it again.") from error


def _check_column(file: SourceFile, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        columns = ", ".join(repr(name) for name in schema.names[:8])
        raise DataError(
            f"{printable(file.name)} has no column {text_key!r} (columns: {printable(columns)})"
            f"{nearest(text_key, schema.names)}; name the one that holds the text with data.text_key=KEY."
        )
    kind = str(schema.field(text_key).type)
    if kind not in ("string", "large_string", "string_view") and "values=string" not in kind:
        raise DataError(
            f"{printable(file.name)}: column {text_key!r} holds {kind}, not text; name another with data.text_key=KEY."
        )
