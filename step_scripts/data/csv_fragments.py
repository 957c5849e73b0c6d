"""Cuts CSV files into fragments that can be read independently.

A fragment is a range of bytes; it holds the lines that begin in it. Cuts are made at line ends without looking at what
stands before them. That is wrong only inside a quoted field that spans lines, and it cannot go unnoticed: by induction
from the start of the file, all cuts lie outside of quotes if every fragment holds an even number of quote characters.
A file with an odd fragment is cut again by `safe_cuts`, which reads it in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from step_scripts.data.csv_header import DIGEST_BLOCK, CsvFile, block_sum, encoding_fault, nul_fault
from step_scripts.data.csv_text import QUOTE, DamagedText, RecordScan, count_byte, count_lines, line_end, with_newlines
from step_scripts.runner import storage
from step_scripts.runner.contract import StepParams

_READ_BYTES = 1 << 23


class Fragment(StepParams):
    """Lines of `file` that begin at or after byte `start` and before `end`; `index` counts over all files."""

    index: int
    file: CsvFile
    start: int
    end: int


def plan_fragments(files: Sequence[CsvFile], fragment_bytes: int) -> list[Fragment]:
    """Fragments of equal size for each file, no larger than `fragment_bytes`, in the order of the rows."""
    fragments: list[Fragment] = []
    for file in files:
        size = file.bytes - file.data_start
        count = max(1, -(-size // fragment_bytes))
        cuts = [file.data_start + size * i // count for i in range(count + 1)]
        fragments += [
            Fragment(index=len(fragments) + i, file=file, start=a, end=b) for i, (a, b) in enumerate(pairwise(cuts))
        ]
    return fragments


def read_fragment(fragment: Fragment, max_line_bytes: int) -> tuple[bytes, int, int]:
    """The lines of a fragment, each with LF at its end, their offset in the file, and the sum of its blocks.

    What ends the last line may be missing. For the sum see `block_sum`. Raises `DamagedText` for what is no text in
    UTF-8.
    """
    file = fragment.file
    if fragment.start >= fragment.end:
        return b"", fragment.start, 0
    begin = fragment.start if fragment.start == file.data_start else fragment.start - 1
    with storage.open_input(file.uri) as source:
        source.seek(begin)
        data = source.read(min(fragment.end + DIGEST_BLOCK, file.bytes) - begin)
        end = _line_end(data, fragment.end - 1 - begin, file.bytes - begin)
        if end < 0 and begin + len(data) < file.bytes:
            data += source.read(max_line_bytes)
            end = _line_end(data, fragment.end - 1 - begin, file.bytes - begin)
    if fragment.end >= file.bytes or end < 0:
        end = len(data)
    start = 0 if fragment.start == file.data_start else _line_end(data, 0, file.bytes - begin)
    start = end if start < 0 else min(start, end)
    lines = with_newlines(data[start:end])
    _check_text(lines, begin + start)
    return lines, begin + start, block_sum(data, begin, fragment.start, fragment.end)


def _line_end(data: bytes, position: int, size: int) -> int:
    return line_end(data, position, complete=len(data) >= size)


def _check_text(data: bytes, offset: int) -> None:
    if (position := data.find(b"\0")) >= 0:
        raise DamagedText(_line_at(data, position), nul_fault(offset + position))
    if not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedText(_line_at(data, error.start), encoding_fault(data, error.start, offset)) from error


def _line_at(data: bytes, position: int) -> int:
    return count_lines(data[:position]) + 1


def has_odd_quotes(data: bytes, max_line_bytes: int) -> bool:
    """Whether the fragment ends inside a quoted field, if it does not begin in one; also if that cannot be known.

    A last line that is longer than it may be has not been read to its end.
    """
    quotes = count_byte(data, QUOTE)
    return quotes % 2 == 1 or (quotes > 0 and len(data) - data.rfind(b"\n") - 1 > max_line_bytes)


def safe_cuts(
    file: CsvFile, cuts: Sequence[int], delimiter: str, max_line_bytes: int
) -> tuple[list[int], DamagedText | None]:
    """For each of `cuts`, ascending, and for the end, the first offset at or after it where a record begins.

    Reads the file from the start in bounded memory, up to the first record that has a quote character out of place, is
    never closed, or is longer than `max_line_bytes`. No offset lies behind the beginning of that record, which is
    returned as a fault, with lines counted from the first row.
    """
    safe: list[int] = []
    scan, before = RecordScan(delimiter, max_line_bytes), b"\n"
    with storage.open_input(file.uri) as source:
        source.seek(file.data_start)
        block = source.read(_READ_BYTES)
        while block and scan.fault is None:
            following = source.read(_READ_BYTES)
            starts = scan.feed(block, before, following[:1]) + file.data_start
            while len(safe) < len(cuts) and (i := int(np.searchsorted(starts, cuts[len(safe)]))) < len(starts):
                safe.append(int(starts[i]))
            before, block = block[-1:], following
    fault = scan.finish()
    end = file.bytes if fault is None else file.data_start + scan.record
    return [*safe, *([end] * (len(cuts) + 1 - len(safe)))], fault
