"""Records of JSON files: one a line, or the elements of one array, or values one after the other, read on access.

Only byte offsets are kept in memory. Arrow is not used because each of its columns has one type, while a conversation's content
may be a string in one record and a list of parts in the next. A bare list of messages is read as a conversation.
"""

from __future__ import annotations

import codecs
import gzip
import json
import mmap
import re
import shlex
import zlib
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from chattrain.chat import Malformed
from chattrain.data.files import COMPRESSED
from chattrain.data.limits import Unpacking, check_row
from chattrain.data.places import Places
from chattrain.errors import UserError
from chattrain.tasks.columns import kind_of

BOM = b"\xef\xbb\xbf"
FIRST_LINE = 1 << 20  # bytes in which the first line must end for the file to be one of lines
RELEASE = 1 << 25  # bytes of a mapped file after which its memory is given back
# Strings as a whole, a quote whose string does not end on its line, what nests, and what is escaped: no search for the end of a
# string begins at a quote within it. A string of JSON has no line break.
_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|"|\\.|[\[\]{},]', re.DOTALL)


class Span(NamedTuple):
    """The bytes of one record."""

    start: int
    stop: int
    line: int | None  # from 1; None: the file is not one of lines


class JsonTable:
    """The records of JSON files. `paths`: the files as messages name them."""

    def __init__(self, files: list[Path], paths: list[Path], max_row_mb: float):
        self.files, self.max_row_mb = files, max_row_mb
        bounds, lines, starts = array("q"), array("q"), []
        of_lines = True
        for file in files:
            starts.append(len(bounds) // 2)
            for span in spans(file):
                bounds.extend(span[:2])
                lines.append(span.line or 0)
                of_lines &= span.line is not None
        self.bounds = np.array(bounds, dtype=np.int64).reshape(-1, 2)  # (records, 2), of each in its file
        self.starts = np.array(starts)
        numbers = np.array(lines, dtype=np.int64) if of_lines else None
        self.places = Places([str(path) for path in paths], starts, numbers)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, i: int) -> dict:
        """Raises Malformed for what is no record."""
        file = self.files[int(np.searchsorted(self.starts, i, side="right")) - 1]
        start, stop = self.bounds[i].tolist()
        check_row(stop - start, self.max_row_mb)
        with file.open("rb") as stream:
            stream.seek(start)
            return parse(stream.read(stop - start), cut=stop == file.stat().st_size)


def first_records(file: Path, count: int, max_row_mb: float) -> list[dict]:
    """Those of the first `count` records that can be read, without reading the rest of the file.

    Raises Malformed with the place and reason of the very first where none can be read.
    """
    found, reason = [], None
    with file.open("rb") as stream:
        for i, (start, stop, line) in enumerate(islice(spans(file), count)):
            stream.seek(start)
            try:
                check_row(stop - start, max_row_mb)
                found.append(parse(stream.read(stop - start), cut=stop == file.stat().st_size))
            except Malformed as error:
                reason = reason or f"{f'row {i}' if line is None else f'line {line}'}: {error}"
    if reason and not found:
        raise Malformed(reason)
    return found


def parse(raw: bytes, cut: bool = False) -> dict:
    """One record. `cut`: the file ends with it. Raises Malformed for what is no record.

    >>> parse(b'{"text": "x"}'), parse(b'[{"role": "user", "content": "Hi"}]')
    ({'text': 'x'}, {'messages': [{'role': 'user', 'content': 'Hi'}]})
    """
    try:
        record = json.loads(raw.removeprefix(BOM).decode(), object_pairs_hook=_object)
    except Malformed:
        raise
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: 0x{raw[error.start]:02x} (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        ended = "; the file ends here: was it cut?" if cut and not raw.endswith(b"\n") else ""
        raise Malformed(f"not JSON: {error.msg} (character {error.pos + 1}){ended}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deep
        raise Malformed(f"not JSON: {str(error).partition(';')[0]}") from None  # without advice for programmers
    if isinstance(record, list):
        return {"messages": record}
    if not isinstance(record, dict):
        raise Malformed(f"{kind_of(record)} instead of an object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of a key that is there twice, a dict would keep the last value alone."""
    found = dict(pairs)
    if len(found) < len(pairs) and (twice := next((key for key, value in pairs if found[key] != value), None)) is not None:
        raise Malformed(f"the key {twice!r:.80} is there twice, with different values")
    return found


def spans(file: Path) -> Iterator[Span]:
    """The records of a file, in order. Raises UserError for a file in UTF-16 or UTF-32."""
    if not file.stat().st_size:
        return
    with file.open("rb") as stream:
        _check_encoding(file, stream.read(4))
        stream.seek(0)
        by_line = _is_of_lines(file, stream)
        stream.seek(0)
        yield from _lines(stream) if by_line else _values(stream)


def _check_encoding(file: Path, head: bytes) -> None:
    wide = "UTF-32" if head in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) else "UTF-16"
    if wide == "UTF-32" or head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        copy = shlex.quote(str(file.with_suffix(f".utf8{file.suffix}")))
        raise UserError(f"{file} is in {wide}; `iconv -f {wide} -t UTF-8 {shlex.quote(str(file))} > {copy}` writes it as UTF-8")


def _is_of_lines(file: Path, stream: BinaryIO) -> bool:
    """Whether each line is a record. It is unless the first begins an array or an object that does not end on it."""
    first = b""
    while not first and (line := stream.readline(FIRST_LINE)):
        first = line.removeprefix(BOM).strip()
    if not first.startswith((b"[", b"{")):
        return True
    whole = _loads(first)
    if whole is None:
        second = _loads(stream.readline(FIRST_LINE)) if file.suffix.lower() != ".jsonl" and first.startswith(b"{") else None
        return first.startswith(b"{") and first != b"{" and (file.suffix.lower() == ".jsonl" or second is not None)
    only_line = not any(line.strip() for line in iter(lambda: stream.readline(FIRST_LINE), b""))
    return not (isinstance(whole, list) and only_line and not _is_conversation(whole))


def _is_conversation(values: list) -> bool:
    """Whether a list holds messages, not records."""
    return bool(values) and isinstance(values[0], dict) and ("role" in values[0] or "from" in values[0])


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _lines(stream: BinaryIO) -> Iterator[Span]:
    start = 0
    for number, line in enumerate(stream, 1):
        if line.removeprefix(BOM).strip():
            yield Span(start, start + len(line), number)
        start += len(line)


def _values(stream: BinaryIO) -> Iterator[Span]:
    """The elements of the array that the file is, or the values that follow each other in it.

    What is wrong within one does not hide the next: they are told apart by brackets, not by parsing them. An array that is not
    closed gives a last record that cannot be parsed.
    """
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = len(BOM) if text[: len(BOM)] == BOM else 0
        is_array = _TOKEN.search(text, start)[0] == b"["  # type: ignore[index]  # `_is_of_lines` has seen a bracket
        level = int(is_array)  # how deep the records are
        opened: list[bytes] = []
        objects = 0  # of the opened
        released = 0
        for token in _TOKEN.finditer(text, start):
            found, depth = token[0], len(opened)
            if found in (b"[", b"{"):
                opened.append(found)
                objects += found == b"{"
                if is_array and depth == 0:
                    start = token.end()
            elif found == b"]" and opened[-1:] == [b"["]:
                opened.pop()
            elif found == b"}" and objects:  # whatever else is open within this object is not closed
                objects -= 1
                while opened.pop() != b"{":
                    pass
            ended = len(opened) < level or (depth > len(opened) == level == 0)
            if ended or (found == b"," and depth == level):
                stop = token.end() if ended and not is_array else token.start()
                yield from _unless_blank(text, start, stop)
                start = token.end()
                if start - released > RELEASE:
                    text.madvise(mmap.MADV_DONTNEED)  # what was read stays in the system's page cache, not in this process
                    released = start
                if ended and is_array:
                    break
        yield from _unless_blank(text, start, len(text))
        if opened == [b"["] and is_array:
            yield Span(len(text), len(text), None)


def _unless_blank(text: mmap.mmap, start: int, stop: int) -> Iterator[Span]:
    if text[start:stop].strip():
        yield Span(start, stop, None)


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def unpack(name: str, file: Path, out: Path, max_unpacked: float) -> None:
    """Write what a compressed file holds to `out`. Raises UserError if it cannot be read to its end, or unpacks to more than it
    may."""
    import pyarrow as pa

    unpacked = Unpacking(name, file, max_unpacked)
    try:
        open_packed = gzip.open if file.suffix.lower() == ".gz" else lambda file: pa.CompressedInputStream(str(file), "zstd")
        with open_packed(file) as stream, out.open("wb") as target:
            while part := stream.read(1 << 20):
                unpacked.add(len(part))
                target.write(part)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"data source {name} ({file}) cannot be unpacked: {error}; fetch it again") from error
