"""Divides CSV text into records, and sets those aside that do not have the header's number of fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from step_scripts.data.csv_text import (
    NEWLINE,
    DamagedText,
    RecordScan,
    blank_bytes,
    count_byte,
    inside_quotes,
    line_ends,
    long_line_fault,
    record_ends,
)

_SHOWN_CHARACTERS = 100


class MalformedRow(NamedTuple):
    """A record with another number of fields than the header: its first line, fields, text, number of lines."""

    line: int
    fields: int
    text: str
    lines: int


@dataclass(frozen=True)
class Records:
    """Rows of a fragment: `data` is CSV whose records all have the right number of fields.

    Of each record, `lines` holds the line within the fragment, from 1, and `spans` how many lines it takes.
    `malformed_rows` are left out.
    """

    data: bytes
    quoted: bool
    lines: np.ndarray
    spans: np.ndarray
    malformed_rows: tuple[MalformedRow, ...] = ()

    def text_of(self, rows: np.ndarray) -> bytes:
        """The records of these indices as CSV."""
        starts, stops = self._bounds[rows].tolist(), self._bounds[rows + 1].tolist()
        return b"".join(self.data[start:stop] for start, stop in zip(starts, stops, strict=True))

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Where each record begins, and the end."""
        return np.concatenate([[0], record_ends(self.data) + 1])


def split_records(
    data: bytes,
    delimiter: str,
    fields: int,
    *,
    max_line_bytes: int,
    single_line: Mapping[int, str] = MappingProxyType({}),
    exact: bool = False,
) -> Records:
    """The records of a text that begins outside of quotes and ends with a line end.

    `single_line`: places, from 0, and names of the fields that never span lines. Without `exact`, a text without
    quotes whose number of delimiters fits is taken as it is: it may still hold rows that are too long if as many are
    too short. Raises `DamagedText` for the first record that is damaged: a quote character out of place, a line end
    where none may be, more than `max_line_bytes`.
    """
    text = np.frombuffer(data, np.uint8)
    within = all_ends = np.empty(0, np.int64)
    if quoted := b'"' in data:
        scan = RecordScan(delimiter, max_line_bytes)
        scan.feed(data)
        if fault := scan.finish():
            limits = {"max_line_bytes": max_line_bytes, "single_line": single_line}
            split_records(data[: scan.record], delimiter, fields, **limits)  # an earlier record may be damaged too
            raise fault
        inside, all_ends = inside_quotes(text), line_ends(text)
        within = all_ends[inside[all_ends]]
    else:
        rows = _checked_rows(text, max_line_bytes)
        if not exact and count_byte(data, ord(delimiter)) == rows * (fields - 1):
            return Records(data, False, np.arange(1, rows + 1, dtype=np.uint32), np.ones(rows, np.uint32))
        inside = None
    separators = np.flatnonzero((text == NEWLINE) | (text == ord(delimiter)))
    if inside is not None:
        separators = separators[~inside[separators]]
    last = np.flatnonzero(text[separators] == NEWLINE)
    counts = np.diff(last, prepend=-1)
    ends = separators[last]
    starts = np.concatenate([np.zeros(1, np.int64), ends + 1])[: len(ends)]
    lines, spans = np.arange(1, len(ends) + 1), np.ones(len(ends), np.int64)
    if len(within):
        _check_single_line(within, all_ends, separators, last, single_line)
        lines = np.searchsorted(all_ends, starts) + 1
        spans = np.searchsorted(all_ends, ends) + 2 - lines
    del separators, last
    good, malformed_rows = counts == fields, ()
    if not good.all():
        blank = _blank(text, starts, counts, delimiter)
        malformed_rows = tuple(
            MalformedRow(int(lines[i]), int(counts[i]), _excerpt(data, starts[i], ends[i]), int(spans[i]))
            for i in np.flatnonzero(~good & ~blank)
        )
        data = text[np.repeat(good, np.diff(starts, append=len(data)))].tobytes()
    return Records(data, quoted, lines[good].astype(np.uint32), spans[good].astype(np.uint32), malformed_rows)


def _checked_rows(text: np.ndarray, max_line_bytes: int) -> int:
    """The number of lines of a text without quotes. Raises `DamagedText` for one that is too long."""
    ends = np.flatnonzero(text == NEWLINE)
    long = np.flatnonzero(np.diff(ends, prepend=-1) > max_line_bytes + 1)
    if len(long):
        raise DamagedText(int(long[0]) + 1, f"the line is {long_line_fault(max_line_bytes)}")
    return len(ends)


def _check_single_line(
    within: np.ndarray, ends: np.ndarray, separators: np.ndarray, last: np.ndarray, single_line: Mapping[int, str]
) -> None:
    """Raise `DamagedText` if one of the line ends `within` quotes stands in a field that never spans lines.

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
        raise DamagedText(
            line,
            f"a quoted field of column {name}, which holds no texts, begins in the first of these lines and ends in "
            "the last. Remove the quote characters that are out of place",
            end,
        )


def _blank(text: np.ndarray, starts: np.ndarray, counts: np.ndarray, delimiter: str) -> np.ndarray:
    """Which records are blank lines."""
    visible = ~np.isin(text, np.frombuffer(blank_bytes(delimiter), np.uint8))
    return (np.add.reduceat(visible, starts, dtype=np.int64) == 0) & (counts == 1)


def _excerpt(data: bytes, start: int, end: int) -> str:
    """The beginning of a record."""
    record = data[start : min(end, start + 4 * _SHOWN_CHARACTERS)]
    return record.decode("utf-8", errors="replace").rstrip("\r\n")[:_SHOWN_CHARACTERS]
