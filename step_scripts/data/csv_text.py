"""Lines and records of CSV text, and the first record that is damaged.

A line ends with LF, with CR LF, or with a CR that no LF follows, mixed as they come. A record ends with a line end
outside of quotes. A line that holds nothing but blanks is no record.
"""

from __future__ import annotations

import numpy as np

NEWLINE, QUOTE, RETURN = 10, 34, 13
_LAST_BLANK = 32


def count_byte(data: bytes, byte: int) -> int:
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


class RecordScan:
    """Reads a text, block by block, that begins with a record.

    `record`: where the last record begins that was seen, or the first that is damaged; `fault`: its damage.
    """

    def __init__(self, delimiter: str, max_line_bytes: int) -> None:
        self.record = 0
        self.fault: DamagedText | None = None
        self._delimiter, self._limit = delimiter, max_line_bytes
        self._size, self._lines, self._inside = 0, 0, False
        self._record_line = self._quote_line = 1
        self._edge = np.zeros(256, np.bool_)
        self._edge[[NEWLINE, RETURN, QUOTE, ord(delimiter)]] = True

    def feed(self, block: bytes, before: bytes = b"\n", after: bytes = b"") -> np.ndarray:
        """Where records begin after those that end in the block, up to the first that is damaged.

        `before` and `after`: the bytes that stand there; none at the end of the text.
        """
        text = np.frombuffer(before + block + (after or self._delimiter.encode()), np.uint8)
        inner, following = text[1:-1], text[2:]
        quotes = np.flatnonzero(inner == QUOTE)
        lines = np.flatnonzero((inner == NEWLINE) | ((inner == RETURN) & (following != NEWLINE)))
        starts = lines[(np.searchsorted(quotes, lines) + self._inside) % 2 == 0] + 1
        bounds = np.concatenate([[self.record - self._size], starts])
        long = np.flatnonzero(np.diff(bounds) > self._limit + 1)
        opening = (np.arange(len(quotes)) % 2 == 0) ^ self._inside
        misplaced = np.flatnonzero(~self._edge[np.where(opening, text[quotes], following[quotes])])

        def line(position: int) -> int:
            return self._lines + int(np.searchsorted(lines, position)) + 1

        quote_record = int(np.searchsorted(starts, quotes[misplaced[0]], "right")) if len(misplaced) else len(bounds)
        damaged = min(quote_record, int(long[0]) if len(long) else len(bounds), len(bounds) - 1)
        if damaged == quote_record:
            i = int(misplaced[0])
            if opening[i]:
                problem = 'a quote character stands inside a field. Quote the whole field and write it as ""'
                self.fault = DamagedText(line(quotes[i]), problem)
            else:  # it was meant to open a field: the fault is where the field was opened that it closes
                opened = line(quotes[i - 1]) if i else self._quote_line
                problem = "a quoted field is not closed before the next delimiter. Add the closing quote"
                self.fault = DamagedText(opened, problem)
        elif len(long):
            first = line(bounds[damaged]) if damaged else self._record_line
            self.fault = self._too_long(first, line(bounds[damaged + 1] - 1))
        self._record_line = line(bounds[damaged]) if damaged else self._record_line
        self.record = self._size + int(bounds[damaged])
        if len(quotes):
            self._quote_line = line(quotes[-1])
        starts = starts[:damaged] + self._size
        self._inside ^= len(quotes) % 2 == 1
        self._size, self._lines = self._size + len(block), self._lines + len(lines)
        return starts

    def finish(self) -> DamagedText | None:
        """The damage of the first damaged record, if there is one; the text ends here."""
        if self.fault is None and self._inside:
            problem = "a quoted field that opens here is never closed. Add the closing quote"
            self.fault = DamagedText(self._quote_line, problem)
        if self.fault is None and self._size - self.record > self._limit:
            self.fault = self._too_long(self._record_line, self._lines + 1)
        return self.fault

    def _too_long(self, first: int, last: int) -> DamagedText:
        if first == last:
            return DamagedText(first, f"the line is {long_line_fault(self._limit)}")
        return DamagedText(
            first,
            f"the row, in which a quoted field spans lines, is longer than max_line_bytes ({self._limit:,}). "
            "Is a quote character missing, or one too many? Raise max_line_bytes if rows are really that long",
            last,
        )
