"""Cuts CSV files into pieces that can be read independently, and the pieces into records.

A piece is a range of bytes; it holds the lines that begin in it. Cuts are made at line ends without looking at what
stands before them. That is wrong only inside a quoted field that spans lines, and it cannot go unnoticed: by induction
from the start of the file, all cuts lie outside of quotes if every piece holds an even number of quote characters.
A file with an odd piece is cut again by `safe_cuts`, which reads it in one go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from step_scripts.data.content_digest import BLOCK, block_sum
from step_scripts.data.csv_header import CsvFile, encoding_fault, long_line_fault, nul_fault
from step_scripts.data.csv_lines import (
    CACHED_BYTES,
    NEWLINE,
    QUOTE,
    blank_bytes,
    count_byte,
    count_lines,
    inside_quotes,
    line_end,
    line_ends,
    with_newlines,
)
from step_scripts.data.csv_records import ChunkFault, RecordScan
from step_scripts.runner import storage
from step_scripts.runner.contract import StepParams

_BLOCK = 1 << 23
_BEYOND_END = BLOCK
_SHOWN_CHARACTERS = 100


class Chunk(StepParams):
    """Lines of `file` that begin at or after byte `start` and before `end`; `index` counts over all files."""

    index: int
    file: CsvFile
    start: int
    end: int


class Misfit(NamedTuple):
    """A record with another number of fields than the header: its first line, fields, text, number of lines."""

    line: int
    fields: int
    text: str
    lines: int


@dataclass(frozen=True)
class Records:
    """Rows of a piece: `data` is CSV whose records all have the right number of fields.

    `lines` holds the line of each record within the piece, from 1; None if record i stands in line i + 1. `spans` holds
    how many lines each takes; None if all take one. `misfits` are the records left out.
    """

    data: bytes
    count: int
    quoted: bool
    lines: np.ndarray | None = None
    spans: np.ndarray | None = None
    misfits: tuple[Misfit, ...] = ()

    def subset(self, rows: np.ndarray) -> Records:
        """The records of these indices, as records of their own without lines."""
        starts, stops = self._bounds[rows].tolist(), self._bounds[rows + 1].tolist()
        data = b"".join(self.data[start:stop] for start, stop in zip(starts, stops, strict=True))
        return Records(data, len(rows), self.quoted)

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Where each record begins, and the end."""
        text = np.frombuffer(self.data, np.uint8)
        starts = range(0, len(text), CACHED_BYTES)
        found = [np.flatnonzero(text[start : start + CACHED_BYTES] == NEWLINE) + start for start in starts]
        ends = np.concatenate([*found, np.empty(0, np.int64)])
        if self.quoted:
            ends = ends[~inside_quotes(text)[ends]]
        return np.concatenate([[0], ends + 1, [len(self.data)]])


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
    """The lines of a piece, each with LF at its end, their offset in the file, and the sum of its blocks.

    What ends the last line may be missing. For the sum see `content_digest`. Raises `ChunkFault` for what is no text in
    UTF-8.
    """
    file = chunk.file
    if chunk.start >= chunk.end:
        return b"", chunk.start, 0
    begin = chunk.start if chunk.start == file.data_start else chunk.start - 1
    with storage.open_input(file.uri) as source:
        source.seek(begin)
        data = source.read(min(chunk.end + _BEYOND_END, file.bytes) - begin)
        end = _line_end(data, chunk.end - 1 - begin, file.bytes - begin)
        if end < 0 and begin + len(data) < file.bytes:
            data += source.read(max_line_bytes)
            end = _line_end(data, chunk.end - 1 - begin, file.bytes - begin)
    if chunk.end >= file.bytes or end < 0:
        end = len(data)
    start = 0 if chunk.start == file.data_start else _line_end(data, 0, file.bytes - begin)
    start = end if start < 0 else min(start, end)
    lines = with_newlines(data[start:end])
    _check_text(lines, begin + start)
    return lines, begin + start, block_sum(data, begin, chunk.start, chunk.end)


def _line_end(data: bytes, position: int, size: int) -> int:
    return line_end(data, position, complete=len(data) >= size)


def _check_text(data: bytes, offset: int) -> None:
    if (position := data.find(b"\0")) >= 0:
        raise ChunkFault(_line_at(data, position), nul_fault(offset + position))
    if not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ChunkFault(_line_at(data, error.start), encoding_fault(data, error.start, offset)) from error


def _line_at(data: bytes, position: int) -> int:
    return count_lines(data[:position]) + 1


def has_odd_quotes(data: bytes, max_line_bytes: int) -> bool:
    """Whether the piece ends inside a quoted field, if it does not begin in one; also if that cannot be known.

    A last line that is longer than it may be has not been read to its end.
    """
    quotes = count_byte(data, QUOTE)
    return quotes % 2 == 1 or (quotes > 0 and len(data) - data.rfind(b"\n") - 1 > max_line_bytes)


def split_records(
    data: bytes,
    delimiter: str,
    fields: int,
    *,
    max_line_bytes: int,
    single_line: Mapping[int, str] = MappingProxyType({}),
    exact: bool = False,
) -> Records:
    """The records of a piece that begins and ends outside of quotes.

    `single_line`: places, from 0, and names of the fields that never span lines. Without `exact`, a piece without
    quotes whose number of delimiters fits is taken as it is: it may still hold rows that are too long if as many are
    too short. Raises `ChunkFault` for the first record that is damaged: a quote character out of place, a line end
    where none may be, more than `max_line_bytes`.
    """
    rows = count_byte(data, NEWLINE) + (0 if data.endswith(b"\n") or not data else 1)
    quoted = b'"' in data
    if not quoted:
        _check_line_lengths(data, max_line_bytes)
        if not exact and count_byte(data, ord(delimiter)) == rows * (fields - 1):
            return Records(data, rows, quoted=False)
    text = np.frombuffer(data, np.uint8)
    separators = np.flatnonzero((text == NEWLINE) | (text == ord(delimiter)))
    within = all_ends = np.empty(0, np.int64)
    if quoted:
        scan = RecordScan(delimiter, max_line_bytes)
        scan.feed(data)
        if fault := scan.finish():
            limits = {"max_line_bytes": max_line_bytes, "single_line": single_line}
            split_records(data[: scan.record], delimiter, fields, **limits)  # an earlier record may be damaged too
            raise fault
        inside, all_ends = inside_quotes(text), line_ends(text)
        separators, within = separators[~inside[separators]], all_ends[inside[all_ends]]
    if not data.endswith(b"\n"):
        separators = np.append(separators, len(data))
    last = np.flatnonzero(np.append(text, np.uint8(NEWLINE))[separators] == NEWLINE)
    counts = np.diff(last, prepend=-1)
    ends = separators[last]
    starts = np.concatenate([[0], ends[:-1] + 1])
    lines, spans = np.arange(1, len(ends) + 1), np.ones(len(ends), np.int64)
    if len(within):
        _check_single_line(within, all_ends, separators, last, single_line)
        lines = np.searchsorted(all_ends, starts) + 1
        spans = np.searchsorted(all_ends, ends) + 2 - lines
    del separators, last
    good = counts == fields
    blank = _blank(text, starts, counts, delimiter) if not good.all() else ~good
    misfits = tuple(
        Misfit(
            int(lines[i]),
            int(counts[i]),
            _excerpt(data[starts[i] : min(ends[i], starts[i] + 4 * _SHOWN_CHARACTERS)]),
            int(spans[i]),
        )
        for i in np.flatnonzero(~good & ~blank)
    )
    if not good.all():
        lengths = np.diff(starts, append=len(data))
        data = text[np.repeat(good, lengths)].tobytes()
    return Records(
        data,
        int(good.sum()),
        quoted,
        lines[good].astype(np.uint32),
        spans[good] if len(within) else None,
        misfits,
    )


def _check_line_lengths(data: bytes, max_line_bytes: int) -> None:
    # A line longer than the limit covers a window of half the limit that begins at a multiple of it.
    window = max_line_bytes // 2
    for start in range(0, len(data) - window + 1, window):
        if data.find(b"\n", start, start + window) < 0:
            begin = data.rfind(b"\n", 0, start) + 1
            end = data.find(b"\n", start)
            if (end if end >= 0 else len(data)) - begin > max_line_bytes:
                raise ChunkFault(_line_at(data, begin), f"the line is {long_line_fault(max_line_bytes)}")


def _check_single_line(
    within: np.ndarray, ends: np.ndarray, separators: np.ndarray, last: np.ndarray, single_line: Mapping[int, str]
) -> None:
    """Raise `ChunkFault` if one of the line ends `within` quotes stands in a field that never spans lines.

    `ends` are all line ends, `separators` end the fields, those at the indices `last` also the records.
    """
    field = np.searchsorted(separators, within)
    first = np.concatenate([[0], last[:-1] + 1])[np.searchsorted(last, field)]
    wrong = np.isin(field - first, list(single_line))
    if wrong.any():
        i = int(np.argmax(wrong))
        bounds = [separators[field[i] - 1] + 1 if field[i] else 0, separators[field[i]]]
        line, end = (int(n) + 1 for n in np.searchsorted(ends, bounds))
        name = single_line[int(field[i] - first[i])]
        raise ChunkFault(
            line,
            f"a quoted field of column {name}, which holds no texts, begins in the first of these lines and ends in "
            "the last. Remove the quote characters that are out of place",
            end,
        )


def _blank(text: np.ndarray, starts: np.ndarray, counts: np.ndarray, delimiter: str) -> np.ndarray:
    """Which records are blank lines."""
    visible = ~np.isin(text, np.frombuffer(blank_bytes(delimiter), np.uint8))
    return (np.add.reduceat(visible, starts, dtype=np.int64) == 0) & (counts == 1)


def _excerpt(record: bytes) -> str:
    return record.decode("utf-8", errors="replace").rstrip("\r\n")[:_SHOWN_CHARACTERS]


def safe_cuts(
    file: CsvFile, cuts: Sequence[int], delimiter: str, max_line_bytes: int
) -> tuple[list[int], ChunkFault | None]:
    """For each of `cuts`, ascending, and for the end, the first offset at or after it where a record begins.

    Reads the file from the start in bounded memory, up to the first record that has a quote character out of place, is
    never closed, or is longer than `max_line_bytes`. No offset lies behind the beginning of that record, which is
    returned as a fault, with lines counted from the first row.
    """
    safe: list[int] = []
    scan, before = RecordScan(delimiter, max_line_bytes), b"\n"
    with storage.open_input(file.uri) as source:
        source.seek(file.data_start)
        block = source.read(_BLOCK)
        while block and scan.fault is None:
            following = source.read(_BLOCK)
            starts = scan.feed(block, before, following[:1]) + file.data_start
            while len(safe) < len(cuts) and (i := int(np.searchsorted(starts, cuts[len(safe)]))) < len(starts):
                safe.append(int(starts[i]))
            before, block = block[-1:], following
    fault = scan.finish()
    end = file.bytes if fault is None else file.data_start + scan.record
    return [*safe, *([end] * (len(cuts) + 1 - len(safe)))], fault
