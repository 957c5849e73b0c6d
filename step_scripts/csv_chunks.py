"""Cuts CSV files into pieces that can be read independently, and the pieces into records.

A piece is a range of bytes; it holds the lines that begin in it. Cuts are made at line ends without looking at what
stands before them. That is wrong only inside a quoted field that spans lines, and it cannot go unnoticed: by induction
from the start of the file, all cuts lie outside of quotes if every piece holds an even number of quote characters.
A file with an odd piece is cut again by `safe_cuts`, which reads it in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from step_scripts import storage
from step_scripts.content_digest import BLOCK, block_sum
from step_scripts.contract import StepParams
from step_scripts.csv_header import CsvFile, encoding_fault, long_line_fault, nul_fault

_BLOCK = 1 << 23
_BEYOND_END = BLOCK
_CACHED_BYTES = 1 << 17  # looked through at once, so that what is found stays in the CPU's cache
_NEWLINE, _QUOTE, _RETURN = 10, 34, 13
_SHOWN_CHARACTERS = 100


class Chunk(StepParams):
    """Lines of `file` that begin at or after byte `start` and before `end`; `index` counts over all files."""

    index: int
    file: CsvFile
    start: int
    end: int


class ChunkFault(Exception):
    """A file that is damaged in line `line`, counted from 1 at the start of the piece."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


@dataclass(frozen=True)
class Records:
    """Rows of a piece: `data` is CSV whose records all have the right number of fields.

    `lines` holds the line of each record within the piece, from 1; None if record i stands in line i + 1. `misfits`
    are the records left out: line, number of fields, text.
    """

    data: bytes
    count: int
    quoted: bool
    lines: np.ndarray | None = None
    misfits: tuple[tuple[int, int, str], ...] = ()

    def subset(self, rows: np.ndarray) -> Records:
        """The records of these indices, as records of their own without lines."""
        starts, stops = self._bounds[rows].tolist(), self._bounds[rows + 1].tolist()
        data = b"".join(self.data[start:stop] for start, stop in zip(starts, stops, strict=True))
        return Records(data, len(rows), self.quoted)

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Where each record begins, and the end."""
        text = np.frombuffer(self.data, np.uint8)
        starts = range(0, len(text), _CACHED_BYTES)
        found = [np.flatnonzero(text[start : start + _CACHED_BYTES] == _NEWLINE) + start for start in starts]
        ends = np.concatenate([*found, np.empty(0, np.int64)])
        if self.quoted:
            ends = ends[~_inside_quotes(text)[ends]]
        return np.concatenate([[0], ends + 1, [len(self.data)]])


def _inside_quotes(text: np.ndarray) -> np.ndarray:
    """For each byte whether it stands inside a quoted field, if the text begins outside. Doubled quotes cancel out."""
    depth = np.cumsum(text == _QUOTE, dtype=np.uint8)  # modulo 256, which keeps what is odd
    depth &= 1
    return depth.view(np.bool_)


def plan_chunks(files: Sequence[CsvFile], chunk_bytes: int) -> list[Chunk]:
    """Pieces of equal size for each file, no larger than `chunk_bytes`, in the order of the rows."""
    chunks: list[Chunk] = []
    for file in files:
        size = file.bytes - file.data_start
        pieces = max(1, -(-size // chunk_bytes))
        cuts = [file.data_start + size * i // pieces for i in range(pieces + 1)]
        chunks += [Chunk(index=len(chunks) + i, file=file, start=a, end=b) for i, (a, b) in enumerate(pairwise(cuts))]
    return chunks


def read_chunk(chunk: Chunk, max_line_bytes: int) -> tuple[bytes, int, int]:
    """The lines of a piece, their offset in the file, and the sum of its blocks (`content_digest`).

    Raises `ChunkFault` for what is no text in UTF-8.
    """
    file = chunk.file
    begin = chunk.start if chunk.start == file.data_start else chunk.start - 1
    with storage.open_input(file.uri) as source:
        source.seek(begin)
        data = source.read(min(chunk.end + _BEYOND_END, file.bytes) - begin)
        end = _line_end(data, chunk.end - 1 - begin)
        if end < 0 and begin + len(data) < file.bytes:
            data += source.read(max_line_bytes)
            end = _line_end(data, chunk.end - 1 - begin)
    if chunk.end >= file.bytes or end < 0:
        end = len(data)
    start = 0 if chunk.start == file.data_start else _line_end(data, 0)
    start = end if start < 0 else min(start, end)
    lines = data[start:end]
    _check_text(lines, begin + start, max_line_bytes)
    return lines, begin + start, block_sum(data, begin, chunk.start, chunk.end)


def _line_end(data: bytes, position: int) -> int:
    """Offset after the first line end at or after `position`; -1 if there is none."""
    return data.find(b"\n", max(position, 0)) + 1 or -1


def _check_text(data: bytes, offset: int, max_line_bytes: int) -> None:
    if (position := data.find(b"\0")) >= 0:
        raise ChunkFault(_line_at(data, position), nul_fault(offset + position))
    if not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ChunkFault(_line_at(data, error.start), encoding_fault(data, error.start, offset)) from error
    # A line longer than the limit covers a window of half the limit that begins at a multiple of it.
    window = max_line_bytes // 2
    for start in range(0, len(data) - window + 1, window):
        if data.find(b"\n", start, start + window) < 0:
            begin = data.rfind(b"\n", 0, start) + 1
            end = data.find(b"\n", start)
            if (end if end >= 0 else len(data)) - begin > max_line_bytes:
                raise ChunkFault(_line_at(data, begin), f"the line is {long_line_fault(max_line_bytes)}")


def _line_at(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def count_byte(data: bytes, byte: int) -> int:
    """How often `byte` stands in `data`. `bytes.count` takes five times as long."""
    text = np.frombuffer(data, np.uint8)
    starts = range(0, len(text), _CACHED_BYTES)
    return sum(int(np.count_nonzero(text[start : start + _CACHED_BYTES] == byte)) for start in starts)


def has_odd_quotes(data: bytes) -> bool:
    """Whether the piece ends inside a quoted field, if it does not begin in one."""
    return count_byte(data, _QUOTE) % 2 == 1


def split_records(data: bytes, delimiter: str, fields: int, *, exact: bool = False) -> Records:
    """The records of a piece that begins and ends outside of quotes.

    Without `exact`, a piece without quotes whose number of delimiters fits is taken as it is: it may still hold
    rows that are too long if as many are too short. Raises `ChunkFault` for a quote character out of place.
    """
    newlines = count_byte(data, _NEWLINE)
    rows = newlines + (0 if data.endswith(b"\n") or not data else 1)
    quoted = b'"' in data
    if not exact and not quoted and count_byte(data, ord(delimiter)) == rows * (fields - 1):
        return Records(data, rows, quoted=False)
    text = np.frombuffer(data, np.uint8)
    separators = np.flatnonzero((text == _NEWLINE) | (text == ord(delimiter)))
    if quoted:
        check_quotes(text, np.flatnonzero(text == _QUOTE), inside=False, delimiter=delimiter)
        separators = separators[~_inside_quotes(text)[separators]]
    if not data.endswith(b"\n"):
        separators = np.append(separators, len(data))
    last = np.flatnonzero(np.append(text, np.uint8(_NEWLINE))[separators] == _NEWLINE)
    counts = np.diff(last, prepend=-1)
    ends = separators[last]
    del separators, last
    starts = np.concatenate([[0], ends[:-1] + 1])
    if len(ends) == rows:
        lines = np.arange(1, rows + 1)
    else:
        lines = np.searchsorted(np.flatnonzero(text == _NEWLINE), starts) + 1
    good = counts == fields
    blank = _blank(text, starts, counts) if not good.all() else ~good
    misfits = tuple(
        (int(lines[i]), int(counts[i]), _excerpt(data[starts[i] : min(ends[i], starts[i] + 4 * _SHOWN_CHARACTERS)]))
        for i in np.flatnonzero(~good & ~blank)
    )
    if not good.all():
        lengths = np.diff(starts, append=len(data))
        data = text[np.repeat(good, lengths)].tobytes()
    return Records(data, int(good.sum()), quoted, lines[good].astype(np.uint32), misfits)


def _blank(text: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which records hold nothing but white space."""
    visible = text > 32
    return (np.add.reduceat(visible, starts, dtype=np.int64) == 0) & (counts == 1)


def _excerpt(record: bytes) -> str:
    return record.decode("utf-8", errors="replace").rstrip("\r\n")[:_SHOWN_CHARACTERS]


def check_quotes(text: np.ndarray, quotes: np.ndarray, *, inside: bool, delimiter: str) -> None:
    """Raise `ChunkFault` for the first quote character that neither begins nor ends a field.

    `text` begins at a line and holds whole lines; `inside` tells whether its beginning is inside a quoted field.
    """
    before = np.where(quotes > 0, text[quotes - 1], _NEWLINE)
    after = np.where(quotes + 1 < len(text), text[np.minimum(quotes + 1, len(text) - 1)], _NEWLINE)
    opening = (np.arange(len(quotes)) % 2 == 0) ^ inside
    edges = (_NEWLINE, ord(delimiter), _QUOTE)
    wrong = np.where(opening, ~np.isin(before, edges), ~np.isin(after, (*edges, _RETURN)))
    if not wrong.any():
        return
    first = int(np.argmax(wrong))
    # What closes a field in the wrong place was meant to open one: the fault is where that field was opened.
    position = quotes[first] if opening[first] else quotes[max(first - 1, 0)]
    line = int(np.count_nonzero(text[:position] == _NEWLINE)) + 1
    if opening[first]:
        raise ChunkFault(line, 'a quote character stands inside a field. Quote the whole field and write it as ""')
    raise ChunkFault(line, "a quoted field is not closed before the next delimiter. Add the closing quote")


def safe_cuts(file: CsvFile, cuts: Sequence[int], delimiter: str, max_line_bytes: int) -> list[int]:
    """For each of `cuts`, ascending, the first offset at or after it where a record begins.

    Reads the file from the start in bounded memory. Raises `ChunkFault`, with a line counted from the first row, for a
    quoted field that is not closed, and for a record longer than `max_line_bytes`.
    """
    safe: list[int] = []
    offset, lines, inside, record, record_line = file.data_start, 0, False, file.data_start, 1
    carry = b""
    with storage.open_input(file.uri) as source:
        source.seek(offset)
        while block := source.read(_BLOCK):
            data = carry + block
            end = data.rfind(b"\n") + 1 if offset + len(data) < file.bytes else len(data)
            carry, text = data[end:], np.frombuffer(data[:end], np.uint8)
            newlines, quotes = np.flatnonzero(text == _NEWLINE), np.flatnonzero(text == _QUOTE)
            try:
                check_quotes(text, quotes, inside=inside, delimiter=delimiter)
            except ChunkFault as fault:
                raise ChunkFault(lines + fault.line, fault.problem) from fault
            ends = newlines[(np.searchsorted(quotes, newlines) + inside) % 2 == 0] + 1
            while len(safe) < len(cuts) and (i := int(np.searchsorted(ends, cuts[len(safe)] - offset))) < len(ends):
                safe.append(offset + int(ends[i]))
            if len(ends):
                record, record_line = offset + int(ends[-1]), lines + int(np.searchsorted(newlines, ends[-1])) + 1
            inside ^= len(quotes) % 2 == 1
            offset, lines = offset + end, lines + len(newlines)
            if offset - record + len(carry) > max_line_bytes + _BLOCK or (offset >= file.bytes and inside):
                raise ChunkFault(record_line, "a quoted field that opens here is never closed. Add the closing quote")
    return [*safe, *([file.bytes] * (len(cuts) - len(safe)))]
