"""Divides CSV text into lines and records; sets those aside that do not have the header's number of fields.

A line ends with LF, with CR LF, or with a CR that no LF follows, mixed as they come. A record ends with a line end
outside of quotes. A line that holds nothing but blanks is no record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NEWLINE, QUOTE, RETURN = 10, 34, 13
_LAST_BLANK = 32
_SHOWN_CHARACTERS = 100


def count_byte(data: bytes | memoryview, byte: int) -> int:
    """How often `byte` stands in `data`. `bytes.count` takes five times as long."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == byte))


def inside_quotes(text: np.ndarray) -> np.ndarray:
    """For each byte whether it stands inside a quoted field, if the text begins outside. Doubled quotes cancel out."""
    depth = np.cumsum(text == QUOTE, dtype=np.uint8)  # modulo 256, which keeps what is odd
    depth &= 1
    return depth.view(np.bool_)


def line_end(data: bytes, position: int, *, complete: bool) -> int:
    """Offset after the first line end at or after `position`, in quotes or not; -1 if there is none.

    `complete`: nothing follows `data`, so that a CR at its end is a line end too.
    """
    newline = data.find(b"\n", position)
    stop = newline if newline >= 0 else len(data)
    single = data.find(b"\r", position, stop)
    if 0 <= single < stop - 1 or (single >= 0 and newline < 0 and complete):
        return single + 1
    return newline + 1 or -1


def record_end(data: bytes, position: int, *, quoted: bool, complete: bool) -> int:
    """Offset after the first line end outside of quotes at or after `position`; -1 if there is none.

    `quoted`: the text at `position` is inside of quotes. `complete` as for `line_end`.
    """
    while True:
        if quoted and not (position := data.find(b'"', position) + 1):
            return -1
        if (end := line_end(data, position, complete=complete)) < 0:
            return -1
        if not (quoted := data.count(b'"', position, end) % 2 == 1):
            return end
        position = end


def line_ends(text: np.ndarray) -> np.ndarray:
    """The position of each line end, in quotes or not: of its LF, or else of its CR."""
    ends = text == NEWLINE
    if (returns := text == RETURN).any():
        returns[:-1] &= ~ends[1:]
        ends |= returns
    return np.flatnonzero(ends)


def record_ends(data: bytes) -> np.ndarray:
    """The position of each LF outside of quotes, in a text that begins outside."""
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == NEWLINE)
    return ends[~inside_quotes(text)[ends]] if b'"' in data else ends


def with_newlines(data: bytes) -> bytes:
    """The text with LF for each CR that ends a record. It keeps its length; it must begin outside of quotes."""
    if b"\r" not in data:
        return data
    text = np.frombuffer(data, np.uint8)
    returns = np.flatnonzero(text == RETURN)
    returns = returns[text[np.minimum(returns + 1, len(text) - 1)] != NEWLINE]
    if b'"' in data:
        returns = returns[~inside_quotes(text)[returns]]
    if not len(returns):
        return data
    changed = text.copy()
    changed[returns] = NEWLINE
    return changed.tobytes()


def count_lines(data: bytes) -> int:
    """How many lines end in a text that `with_newlines` returned."""
    if b'"' in data and b"\r" in data:
        return len(line_ends(np.frombuffer(data, np.uint8)))
    return count_byte(data, NEWLINE)


def count_records(data: bytes, delimiter: str) -> int:
    """How many records a text holds that `with_newlines` returned, without regard to their fields."""
    text = np.frombuffer(data, np.uint8)
    starts = np.concatenate([np.zeros(1, np.int64), record_ends(data) + 1])
    starts = starts[starts < len(text)]
    blanks, blank_lines = blank_bytes(delimiter), 0
    for start in starts[text[starts] <= _LAST_BLANK].tolist():
        end = data.find(b"\n", start)
        blank_lines += not data[start : end if end >= 0 else len(data)].strip(blanks)
    return len(starts) - blank_lines


def blank_bytes(delimiter: str) -> bytes:
    """What may stand in a blank line."""
    return bytes(range(_LAST_BLANK + 1)).replace(delimiter.encode(), b"")


def long_line_fault(limit: int) -> str:
    """What a line without an end means."""
    return (
        f"longer than max_line_bytes ({limit:,}): no line end where one is due. "
        "Correct the file, or raise max_line_bytes if its lines are really that long"
    )


class DamagedText(Exception):
    """A file that is damaged in lines `line` to `last`, counted from 1 at the start of the text."""

    def __init__(self, line: int, problem: str, last: int | None = None) -> None:
        super().__init__(line, problem, last)
        self.line = line
        self.last = line if last is None else last
        self.problem = problem


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
    lines: np.ndarray
    spans: np.ndarray
    malformed_rows: tuple[MalformedRow, ...] = ()

    def text_of(self, rows: np.ndarray) -> bytes:
        """The records of these indices as CSV."""
        bounds = np.concatenate([[0], record_ends(self.data) + 1])
        starts, stops = bounds[rows].tolist(), bounds[rows + 1].tolist()
        return b"".join(self.data[start:stop] for start, stop in zip(starts, stops, strict=True))


def split_records(
    data: bytes,
    delimiter: str,
    fields: int,
    *,
    max_line_bytes: int,
    single_line: Mapping[int, str],
    exact: bool = False,
) -> Records:
    """The records of a text that begins outside of quotes and ends with a line end, as `with_newlines` returned it.

    `single_line`: places, from 0, and names of the fields that never span lines. Without `exact`, a text without
    quotes whose number of delimiters fits is taken as it is: it may still hold rows that are too long if as many are
    too short. Raises `DamagedText` for the first record that is damaged: a quote character out of place, a line end
    where none may be, more than `max_line_bytes`.
    """
    text = np.frombuffer(data, np.uint8)
    quoted, inside = b'"' in data, None
    all_ends = ends = np.flatnonzero(text == NEWLINE)
    if quoted:
        inside, all_ends = inside_quotes(text), line_ends(text)
        ends = ends[~inside[ends]]
    damages = list(_long_records(all_ends, ends, max_line_bytes))
    if not (quoted or damages or exact) and count_byte(data, ord(delimiter)) == len(ends) * (fields - 1):
        return Records(data, np.arange(1, len(ends) + 1, dtype=np.uint32), np.ones(len(ends), np.uint32))
    separators = np.flatnonzero((text == NEWLINE) | (text == ord(delimiter)))
    if inside is not None:
        separators = separators[~inside[separators]]
    last = np.flatnonzero(text[separators] == NEWLINE)
    if inside is not None:
        spanning = all_ends[inside[all_ends]]
        damages = [*_stray_quotes(text, delimiter, all_ends, ends), *damages]
        damages += _spanning_fields(spanning, all_ends, separators, last, single_line)
    if damages:  # of the first damaged record the first
        raise min(damages, key=lambda damage: damage[0])[1]
    counts = np.diff(last, prepend=-1)
    del separators, last
    starts = np.concatenate([np.zeros(1, np.int64), ends + 1])[: len(ends)]
    lines, spans = np.arange(1, len(ends) + 1), np.ones(len(ends), np.int64)
    if len(all_ends) > len(ends):
        lines = np.searchsorted(all_ends, starts) + 1
        spans = np.searchsorted(all_ends, ends) + 2 - lines
    good, malformed_rows = counts == fields, ()
    if not good.all():
        visible = ~np.isin(text, np.frombuffer(blank_bytes(delimiter), np.uint8))
        blank = (np.add.reduceat(visible, starts, dtype=np.int64) == 0) & (counts == 1)
        malformed_rows = tuple(
            MalformedRow(int(lines[i]), int(counts[i]), _excerpt(data, starts[i], ends[i]), int(spans[i]))
            for i in np.flatnonzero(~good & ~blank)
        )
        data = text[np.repeat(good, np.diff(starts, append=len(data)))].tobytes()
    return Records(data, lines[good].astype(np.uint32), spans[good].astype(np.uint32), malformed_rows)


# What may be damaged in a text: the first record of each kind, by its number, and what is wrong with it.


def _long_records(all_ends: np.ndarray, ends: np.ndarray, limit: int) -> Iterator[tuple[int, DamagedText]]:
    """A record of more than `limit` bytes. `all_ends` are the ends of lines, `ends` of records."""
    long = np.diff(ends, prepend=-1) > limit + 1
    if not long.any():
        return
    record = int(np.argmax(long))
    first, last = (int(n) + 1 for n in np.searchsorted(all_ends, [ends[record - 1] + 1 if record else 0, ends[record]]))
    if first == last:
        yield record, DamagedText(first, f"the line is {long_line_fault(limit)}")
    else:
        problem = (
            f"the row, in which a quoted field spans lines, is longer than max_line_bytes ({limit:,}). "
            "Is a quote character missing, or one too many? Raise max_line_bytes if rows are really that long"
        )
        yield record, DamagedText(first, problem, last)


def _stray_quotes(
    text: np.ndarray, delimiter: str, all_ends: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[int, DamagedText]]:
    """A quote character that neither begins nor ends a field, and a quoted field without an end."""
    quotes = np.flatnonzero(text == QUOTE)
    opening = np.arange(len(quotes)) % 2 == 0
    # What stands before the first byte is, as the last byte, a line end.
    beside = text[np.where(opening, quotes - 1, quotes + 1)]
    misplaced = ~np.isin(beside, np.array([NEWLINE, RETURN, QUOTE, ord(delimiter)], np.uint8))
    if misplaced.any():
        i = int(np.argmax(misplaced))
        record = int(np.searchsorted(ends, quotes[i]))
        if opening[i]:
            problem = 'a quote character stands inside a field. Quote the whole field and write it as ""'
        else:  # it was meant to open a field: the fault is where the field was opened that it closes
            problem, i = "a quoted field is not closed before the next delimiter. Add the closing quote", i - 1
        yield record, DamagedText(int(np.searchsorted(all_ends, quotes[i])) + 1, problem)
    if len(quotes) % 2:
        problem = "a quoted field that opens here is never closed. Add the closing quote"
        yield len(ends), DamagedText(int(np.searchsorted(all_ends, quotes[-1])) + 1, problem)


def _spanning_fields(
    spanning: np.ndarray, all_ends: np.ndarray, separators: np.ndarray, last: np.ndarray, single_line: Mapping[int, str]
) -> Iterator[tuple[int, DamagedText]]:
    """A field that never spans lines, and holds one of the line ends `spanning`, which are in quotes.

    `separators` end the fields, those at the indices `last` also the records.
    """
    field = np.searchsorted(separators, spanning)
    field = field[field < len(separators)]  # the others are in a field without an end
    record = np.searchsorted(last, field)
    place = field - np.concatenate([[0], last + 1])[record]
    wrong = np.isin(place, list(single_line))
    if wrong.any():
        i = int(np.argmax(wrong))
        bounds = [separators[field[i] - 1] + 1 if field[i] else 0, separators[field[i]]]
        first, end = (int(n) + 1 for n in np.searchsorted(all_ends, bounds))
        problem = (
            f"a quoted field of column {single_line[int(place[i])]}, which holds no texts, begins in the first of "
            "these lines and ends in the last. Remove the quote characters that are out of place"
        )
        yield int(record[i]), DamagedText(first, problem, end)


def _excerpt(data: bytes, start: int, end: int) -> str:
    """The beginning of a record."""
    record = data[start : min(end, start + 4 * _SHOWN_CHARACTERS)]
    return record.decode("utf-8", errors="replace").rstrip("\r\n")[:_SHOWN_CHARACTERS]
