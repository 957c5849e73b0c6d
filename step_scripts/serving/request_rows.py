"""Rows of request bodies, a bounded piece at a time: a body never becomes one object a cell all at once.

A row may have `size` characters; what is longer is refused. The reader of a piece decides whether it wants the next.
A JSON object becomes a tuple of its members, `(name, value)`: so a name that is given twice is seen.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from step_scripts.runner.wording import counted

_MAX_SHOWN = 100  # characters of a wrong value
_SOME_ROWS = 1000  # that are looked at one by one, before it is asked whether there are problems enough
# What stands for a cell that holds no number; one that is empty is NaN. Neither is within the bounds of a column.
NOT_FINITE, NOT_A_NUMBER = math.inf, -math.inf
# A row is its cells in the order of the features, or the reason why it cannot be one.
Row = Sequence[Any] | str

_DECODER = json.JSONDecoder(object_pairs_hook=tuple)
_BEGINNING = re.compile(r'[ \t\n\r]*(\{[ \t\n\r]*"instances"[ \t\n\r]*:[ \t\n\r]*)?\[[ \t\n\r]*(\][ \t\n\r]*)?')
_BEHIND_ROW = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_END_OF_OBJECT = re.compile(r"\}[ \t\n\r]*")


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, reason, and for bad rows a table of what is wrong.

    `rows` holds at most 100 entries `{"row", "column", "value", "reason"}`, `problems` how many there are or, in a
    large body, were found until it was read no further. Rows count from 1, without a header line.
    """

    def __init__(self, status: int, reason: str, rows: Sequence[dict[str, Any]] = (), problems: int = 0) -> None:
        super().__init__(reason)
        self.status = status
        self.rows = rows
        self.problems = problems

    def body(self) -> dict[str, Any]:
        """The response's JSON. AWS clients read `message`."""
        value: dict[str, Any] = {"error": str(self), "message": str(self)}
        if self.problems:
            value |= {"problems": self.problems, "rows": self.rows}
        return value


class CsvRecords:
    """Records of a CSV text whose lines end with LF. `position`: where the next one begins; `line`: its first line."""

    def __init__(self, text: str, size: int) -> None:
        self._text = text
        self._size = size
        self._begin = 0
        self._reader = csv.reader(self._lines(), strict=True)
        self.position = 0
        self.line = 1

    @property
    def ended(self) -> bool:
        """Whether there are no more."""
        return self.position >= len(self._text)

    def whole_lines(self, characters: int) -> str:
        """The next whole lines, so many characters at most; they stay where they are. May be nothing."""
        end = self.position + characters
        if end < len(self._text):
            end = self._text.rfind("\n", self.position, end) + 1
        return self._text[self.position : end]

    def read(self) -> list[str]:
        """The fields of the next record. Raises `RequestError` 400 where it is not CSV, or too long."""
        self._begin, first = self.position, self.line
        try:
            return next(self._reader)
        except csv.Error as error:
            last = self.line - 1
            one = str(error) == "unexpected end of data" or last == first
            where = f"line {first}" if one else f"the record of lines {first} to {last}"
            raise RequestError(400, f"the body is not CSV: {where}: {error}") from error

    def rest(self) -> int:
        """How many lines there are still."""
        return 0 if self.ended else 1 + self._text.count("\n", self.position)

    def _lines(self) -> Iterator[str]:
        first = self.line
        while self.position < len(self._text):
            if self.position == self._begin:
                first = self.line
            end = self._text.find("\n", self.position) + 1 or len(self._text)
            if end - self._begin > self._size:
                hint = "is a quote or a line end missing?"
                raise RequestError(400, f"line {first} begins a row of more than {self._size} characters; {hint}")
            line = self._text[self.position : end]
            self.position, self.line = end, self.line + 1
            yield line


@dataclass(frozen=True)
class Layout:
    """How many fields a CSV record has, at which places the features are, and what to say if it has not as many."""

    width: int
    places: tuple[int, ...]
    hint: str

    def wrong_width(self, fields: int) -> str:
        """Why a record of so many fields is no row."""
        return f"{counted(fields, 'field')}, expected {self.width}{self.hint}"


def csv_rows(records: CsvRecords, layout: Layout) -> list[Row]:
    """Some of the next records. Raises `RequestError` where a line end in quotes makes several lines one bad row."""
    rows: list[Row] = []
    while not records.ended and len(rows) < _SOME_ROWS:
        first = records.line
        record = records.read()
        if records.line > first + 1 and (
            len(record) != layout.width or any("\n" in record[place] for place in layout.places)
        ):
            what = f"the record of lines {first} to {records.line - 1} has a line end within quotes"
            raise RequestError(400, f"{what}; is one of them out of place?")
        fits = len(record) == layout.width
        rows.append([record[place] for place in layout.places] if fits else layout.wrong_width(len(record)))
    return rows


def text_number(field: str, boolean: bool) -> float:
    """The number in a field of CSV, or what stands for none."""
    field = field.strip()
    if not field:
        return math.nan
    if boolean and field.lower() in ("true", "false"):
        return float(field.lower() == "true")
    # Python's float reads 1_000 and other scripts' digits.
    return NOT_A_NUMBER if "_" in field or not field.isascii() else _finite(field)


def json_number(value: Any, boolean: bool) -> float:
    """The same for a value of JSON."""
    if value is None:
        return math.nan
    return _finite(value) if type(value) in (int, float) or (type(value) is bool and boolean) else NOT_A_NUMBER


def _finite(value: str | float) -> float:
    try:
        number = float(value)
    except ValueError:
        return NOT_A_NUMBER
    except OverflowError:
        return NOT_FINITE
    return number if math.isfinite(number) else NOT_FINITE


def json_pieces(text: str, size: int) -> Iterator[tuple[list[Any], int]]:
    """Rows of a JSON body, and where what follows them begins. Raises `RequestError` 400."""
    if len(text) <= size:
        yield _rows(_json(text, "the body")), len(text)
        return
    if (beginning := _BEGINNING.match(text)) is None:
        raise RequestError(
            400, f'the body is neither a list nor an object that begins with "instances", and larger than {size} bytes'
        )
    position, ended = beginning.end(), beginning[2] is not None
    while not ended:
        window, last = text[position : position + size], position + size >= len(text)
        rows, at = [], 0
        while not ended:
            try:
                value, end = _DECODER.raw_decode(window, at)
            except json.JSONDecodeError as error:
                if last:
                    raise _not_json(error.msg, text, position + error.pos) from None
                break  # it counts only if it comes again when the window begins here
            except (RecursionError, ValueError) as error:
                raise _refusal(error, "the body") from error
            behind = _BEHIND_ROW.match(window, end)
            if behind is None and last:
                raise _not_json("Expecting ',' delimiter", text, position + end)
            if behind is None or (behind.end() == len(window) and not last):
                break  # the window may end in the middle of a number or of white space
            rows.append(value)
            at, ended = behind.end(), behind[1] == "]"
        if not rows:
            raise RequestError(400, f"the row at character {position} has more than {size} characters, or is not JSON")
        position += at
        yield rows, len(text) if ended else position
    if beginning[1] is not None:
        if text.startswith(",", position):
            raise RequestError(400, "unknown members beside instances")
        if (end := _END_OF_OBJECT.match(text, position)) is None:
            raise _not_json("Expecting ',' delimiter", text, position)
        position = end.end()
    if position < len(text):
        raise _not_json("Extra data", text, position)


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
        rows = [_json(line, f"line {n}") for n, line in enumerate(lines, number) if line.strip()]
        position, number = end, number + len(lines) - 1
        yield rows, position


def _json(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (RecursionError, ValueError) as error:
        raise _refusal(error, where) from error


def _refusal(error: Exception, where: str) -> RequestError:
    if isinstance(error, RecursionError):
        return RequestError(400, f"{where} is nested too deeply")
    return RequestError(400, f"{where} is not JSON: {error}")


def _not_json(problem: str, text: str, position: int) -> RequestError:
    return _refusal(json.JSONDecodeError(problem, text, position), "the body")


def _rows(value: Any) -> list[Any]:
    """The rows in a JSON body: `instances`, a list of rows, or a row by itself. Raises `RequestError` 400."""
    if isinstance(value, tuple):
        names = [name for name, _ in value]
        if "instances" not in names:
            return [value]
        if others := sorted({*names} - {"instances"}):
            raise RequestError(400, f"unknown members beside instances: {', '.join(others[:20])}")
        if len(names) > 1:
            raise RequestError(400, "instances is given twice")
        value = dict(value)["instances"]
        if not isinstance(value, list):
            raise RequestError(400, "instances is not a list")
        return value
    if not isinstance(value, list):
        raise RequestError(400, "the body is neither an object nor a list")
    return [value] if value and not any(isinstance(row, list | tuple) for row in value) else value


def decode_text(body: bytes) -> str:
    """The body as text. Raises `RequestError` 400 if it is not UTF-8 or blank."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise RequestError(400, "the body is empty")
    return text


def shown(value: Any) -> Any:
    """`value` as it is reported: short, and valid JSON."""
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and abs(value) < 10**18:
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
