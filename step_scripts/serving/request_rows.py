"""Rows of request bodies, a bounded piece at a time: a body never becomes one object a cell all at once.

A row may have `size` characters; what is longer is refused. The reader of a piece decides whether it wants the next.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Generator, Iterator
from json.scanner import make_scanner
from typing import Any

from step_scripts.runner.wording import counted
from step_scripts.serving.media import RequestError, json_rows, load_json

_SCAN: Callable[[str, int], tuple[Any, int]] = make_scanner(json.JSONDecoder())  # pyright: ignore[reportArgumentType]
_INSTANCES = re.compile(r'[ \t\n\r]*\{[ \t\n\r]*"instances"[ \t\n\r]*:[ \t\n\r]*\[')
_LIST = re.compile(r"[ \t\n\r]*\[")
_STARTS = frozenset("[{")  # of rows
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_END = re.compile(r"[ \t\n\r]*\][ \t\n\r]*")


class CsvRecords:
    """Records of a CSV text whose lines end with LF.

    `position`: where the next one begins; `line`: the number of its first line; `spans`: first and last line of those
    among the records read last that have several, by index.
    """

    def __init__(self, text: str, size: int) -> None:
        self._text = text
        self._size = size
        self.position = 0
        self.line = 1
        self.spans: dict[int, tuple[int, int]] = {}

    @property
    def ended(self) -> bool:
        """Whether there are no more."""
        return self.position >= len(self._text)

    def lines(self, characters: int) -> str:
        """The next whole lines, `characters` at most together, which stay where they are. May be nothing."""
        end = self.position + characters
        if end < len(self._text):
            end = self._text.rfind("\n", self.position, end) + 1
        return self._text[self.position : end]

    def skip(self, lines: str) -> None:
        """Pass over what `lines` has returned."""
        self.position += len(lines)
        self.line += lines.count("\n")

    def read(self, characters: int, count: int | None = None) -> list[list[str]]:
        """The next records that begin within so many characters, at most `count`, as lists of fields.

        Raises `RequestError` 400 where the text is not CSV, and for a record of more than `size` characters.
        """
        begin = self.position
        window = self._text[begin : begin + characters + self._size]
        stream = io.StringIO(window, newline="")
        reader = csv.reader(stream, strict=True)
        cut = begin + len(window) < len(self._text)
        records: list[list[str]] = []
        self.spans = {}
        while (start := stream.tell()) < min(characters, len(window)) and len(records) != count:
            first = self.line + reader.line_num
            try:
                record = next(reader)
            except csv.Error as error:
                if cut and stream.tell() == len(window):
                    raise self._too_long(first) from error
                last = self.line + reader.line_num - 1
                where = f"line {first}" if str(error) == "unexpected end of data" or last == first else None
                where = where or f"the record of lines {first} to {last}"
                raise RequestError(400, f"the body is not CSV: {where}: {error}") from error
            if stream.tell() - start > self._size or (cut and stream.tell() == len(window)):
                raise self._too_long(first)
            if (last := self.line + reader.line_num - 1) > first:
                self.spans[len(records)] = (first, last)
            records.append(record)
        self.position = begin + stream.tell()
        self.line += reader.line_num
        return records

    def _too_long(self, line: int) -> RequestError:
        hint = "; is a quote or a line end missing?"
        return RequestError(400, f"line {line} begins a row of more than {self._size} characters{hint}")


def json_pieces(text: str, size: int) -> Iterator[tuple[list[Any], int]]:
    """Rows of a JSON body, and where what follows them begins. Raises `RequestError` 400."""
    if len(text) <= size:
        yield json_rows(load_json(text, "the body")), len(text)
        return
    if (beginning := _LIST.match(text)) is not None:
        end = yield from _elements(text, beginning.end(), size)
    elif (beginning := _INSTANCES.match(text)) is not None:
        end = yield from _elements(text, beginning.end(), size)
        if text.startswith(",", end):
            raise RequestError(400, "unknown members beside instances")
        if not text.startswith("}", end):
            raise _not_json("Expecting ',' delimiter", text, end)
        end = _after(_SPACE, text, end + 1)
    else:
        raise RequestError(
            400, f'the body is neither a list nor an object that begins with "instances", and larger than {size} bytes'
        )
    if end < len(text):
        raise _not_json("Extra data", text, end)


def json_line_pieces(text: str, size: int) -> Iterator[tuple[list[Any], int]]:
    """Rows of a body of JSON lines, and where what follows them begins. Raises `RequestError` 400."""
    position, number = 0, 1
    while position < len(text):
        end = position + size
        if end < len(text):
            end = text.rfind("\n", position, end) + 1
            if not end:
                raise RequestError(400, f"line {number} has more than {size} characters")
        lines = text[position:end].split("\n")
        rows = [load_json(line, f"line {n}") for n, line in enumerate(lines, number) if line.strip()]
        position, number = end, number + len(lines) - 1
        yield rows, position


def _elements(text: str, position: int, size: int) -> Generator[tuple[list[Any], int], None, int]:
    """The elements of the list whose first one begins at `position`; returns where what follows the list begins."""
    position = _after(_SPACE, text, position)
    first = True
    if (end := _END.match(text, position)) is not None:
        return end.end()
    while True:
        window = text[position : position + size]
        last = position + len(window) == len(text)
        rows, used, ended = _decoded(window, text, position, last)
        if not rows:
            problem = f"the row at character {position} has more than {size} characters, or is not JSON"
            raise RequestError(400, problem)
        if first and not any(isinstance(row, list | dict) for row in rows):
            if not ended:
                raise RequestError(400, f"the body is one list of more than {counted(len(rows), 'value')}")
            rows = [rows]
        first = False
        position += used
        yield rows, len(text) if ended else position
        if ended:
            return position


def _decoded(window: str, text: str, position: int, last: bool) -> tuple[list[Any], int, bool]:
    """Complete elements of a list at the start of `window`, where the next begins, and whether the list has ended.

    An error in a window that is not the `last` is one only if it comes again when the window begins there.
    """
    rows, at = _decoded_at_once(window)
    while True:
        try:
            value, end = _SCAN(window, at)
        except RecursionError as error:
            raise RequestError(400, "the body is nested too deeply") from error
        except StopIteration as error:
            if last:
                raise _not_json("Expecting value", text, position + error.value) from None
            return rows, at, False
        except json.JSONDecodeError as error:
            if last:
                raise _not_json(error.msg, text, position + error.pos) from None
            return rows, at, False
        except ValueError as error:  # an integer of too many digits
            raise RequestError(400, f"the body is not JSON: {error}") from error
        if window[end : end + 1] == "," and window[end + 1 : end + 2] in _STARTS:  # the usual case
            rows.append(value)
            at = end + 1
        elif (comma := _COMMA.match(window, end)) is not None and comma.end() < len(window):
            rows.append(value)
            at = comma.end()
        elif (closing := _END.match(window, end)) is not None and (last or closing.end() < len(window)):
            return [*rows, value], closing.end(), True
        elif last:
            raise _not_json("Expecting ',' delimiter", text, position + end)
        else:
            return rows, at, False


def _decoded_at_once(window: str) -> tuple[list[Any], int]:
    """The same for as many elements as are known to be followed by another, or none if that is not so simple.

    If the text up to the end of a list or an object is one of JSON's lists when a bracket is put at either end, then
    its elements are those that would be read one by one.
    """
    for between in ("],[", "},{", "], [", "}, {", "],\n", "},\n"):
        if (end := window.rfind(between)) > 0:
            try:
                return json.loads(f"[{window[: end + 1]}]"), end + len(between) - 1
            except (ValueError, RecursionError):
                break
    return [], 0


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found is not None else position


def _not_json(problem: str, text: str, position: int) -> RequestError:
    return RequestError(400, f"the body is not JSON: {json.JSONDecodeError(problem, text, position)}")
