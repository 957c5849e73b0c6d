"""Where the records of CSV text begin, and the first that is damaged, in bounded memory."""

from __future__ import annotations

import numpy as np

from step_scripts.data.csv_header import long_line_fault
from step_scripts.data.csv_lines import NEWLINE, QUOTE, RETURN


class ChunkFault(Exception):
    """A file that is damaged in lines `line` to `last`, counted from 1 at the start of the text."""

    def __init__(self, line: int, problem: str, last: int | None = None) -> None:
        super().__init__(problem)
        self.line = line
        self.last = line if last is None else last
        self.problem = problem


class RecordScan:
    """Reads a text, block by block, that begins with a record.

    `record`: where the last record begins that was seen, or the first that is damaged; `fault`: its damage.
    """

    def __init__(self, delimiter: str, max_line_bytes: int) -> None:
        self.record = 0
        self.fault: ChunkFault | None = None
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
                self.fault = ChunkFault(line(quotes[i]), problem)
            else:  # it was meant to open a field: the fault is where the field was opened that it closes
                opened = line(quotes[i - 1]) if i else self._quote_line
                problem = "a quoted field is not closed before the next delimiter. Add the closing quote"
                self.fault = ChunkFault(opened, problem)
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

    def finish(self) -> ChunkFault | None:
        """The damage of the first damaged record, if there is one; the text ends here."""
        if self.fault is None and self._inside:
            problem = "a quoted field that opens here is never closed. Add the closing quote"
            self.fault = ChunkFault(self._quote_line, problem)
        if self.fault is None and self._size - self.record > self._limit:
            self.fault = self._too_long(self._record_line, self._lines + 1)
        return self.fault

    def _too_long(self, first: int, last: int) -> ChunkFault:
        if first == last:
            return ChunkFault(first, f"the line is {long_line_fault(self._limit)}")
        return ChunkFault(
            first,
            f"the row, in which a quoted field spans lines, is longer than max_line_bytes ({self._limit:,}). "
            "Is a quote character missing, or one too many? Raise max_line_bytes if rows are really that long",
            last,
        )
