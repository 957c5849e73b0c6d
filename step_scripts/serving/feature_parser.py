"""Bodies of inference requests to raw features, checked against the table that the model was trained on.

Accepted: `text/csv` (features in the schema's order, or with a header line in any order and case), `application/json`
(`{"instances": [...]}`, a list of rows, one row) and JSON lines; a row is a list of features in the schema's order or
an object. Other columns of the table (target, keys, event time) may be there and are ignored.

A body is read a piece at a time, until a hundred problems have been found: a refused one costs no more than one that is
answered. Lines of CSV end with LF, CR LF or CR; a line end in quotes is allowed in columns that are no features.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl

from step_scripts.runner.wording import counted
from step_scripts.serving.media import CSV, JSON, MAX_REPORTED_PROBLEMS, RequestError, decode_text, shown
from step_scripts.serving.request_rows import CsvRecords, json_line_pieces, json_pieces
from step_scripts.table.polars_csv import read_csv
from step_scripts.table.spec import ColumnSpec, TableSpec

_QUICK_BYTES = 2048  # of a single CSV line that is tried without the CSV reader
_BATCH = 4096  # characters from which on Polars is faster than the CSV reader
# Characters of a CSV piece: larger and larger while few rows are not in order, smaller while many are not.
_LARGEST, _FIRST, _SMALLEST, _STEP = 1 << 22, 1 << 18, 1 << 14, 4
_DOUBTFUL = 1000  # rows that are looked at one by one, before it is asked whether there are problems enough
_ROW, _ROW_PER_COLUMN = 1 << 16, 64  # characters that a row may have, at least
_COMMA, _LINE_END, _QUOTE = b',\n"'
_OK, _MISSING, _NOT_A_NUMBER, _NOT_FINITE, _NOT_WHOLE, _OUTSIDE = range(6)
_WHOLE = ("int64", "bool")


class _Found:
    """Rows of a request so far, in pieces, or what is wrong with them."""

    def __init__(self, features: Sequence[str]) -> None:
        self._values: list[np.ndarray] = [np.empty((0, len(features)))]
        self._rows = self._bad_rows = self._total = 0
        self._problems: list[dict[str, Any]] = []

    @property
    def enough(self) -> bool:
        """Whether there are as many problems as are reported: what is wrong beside them changes nothing."""
        return self._total >= MAX_REPORTED_PROBLEMS

    def add(self, values: np.ndarray) -> None:
        """Add rows that are in order."""
        self._rows += len(values)
        if not self._problems:
            self._values.append(values)

    def add_problems(self, rows: int, problems: Sequence[dict[str, Any]], total: int, bad_rows: int) -> None:
        """Add `rows` rows of which `bad_rows` are wrong; `problems`, some of `total`, count rows from 0."""
        self._values.clear()
        self._problems += [{**problem, "row": self._rows + 1 + problem["row"]} for problem in problems]
        self._rows, self._total, self._bad_rows = self._rows + rows, self._total + total, self._bad_rows + bad_rows

    def result(self, more: int = 0) -> np.ndarray:
        """The features. Raises `RequestError` 400 where there are problems; `more`: rows not looked at, about."""
        if not self._rows:
            raise RequestError(400, "the request has no rows")
        if not self._problems:
            return np.concatenate(self._values)
        reported = self._problems[:MAX_REPORTED_PROBLEMS]
        where = f"row {reported[0]['row']}" + (f", {reported[0]['column']}" if reported[0]["column"] else "")
        bad = f"at least {self._bad_rows} of about" if more else f"{self._bad_rows} of"
        rows = counted(self._rows + more, "row")
        summary = f"{bad} {rows} cannot be used; first: {where}: {reported[0]['reason']}"
        raise RequestError(400, summary, reported, self._total)


class FeatureParser:
    """Turns request bodies into raw features, and refuses what the table does not allow."""

    def __init__(self, table: TableSpec) -> None:
        self.features = table.features
        self._columns = [table.column(name) for name in table.features]
        self._names = {name: name for name in table.column_names}
        folded = [(name.casefold(), name) for name in table.column_names]
        for fold, name in folded:
            if sum(fold == other for other, _ in folded) == 1:
                self._names.setdefault(fold, name)
        self._limits = [column.limits for column in self._columns]
        self._whole = [column.dtype in _WHOLE for column in self._columns]
        self._row_characters = max(_ROW, _ROW_PER_COLUMN * len(table.columns))
        self._header_places = lru_cache(maxsize=256)(self._places)

    def parse(self, body: bytes, media: str) -> np.ndarray:
        """Raw features: float64, shape (rows, features), nulls as NaN. Raises `RequestError` 400."""
        if media == CSV:
            quick = self._quick_csv(body)
            return quick if quick is not None else self._csv(decode_text(body))
        found = _Found(self.features)
        pieces, begins = (json_pieces, "[{") if media == JSON else (json_line_pieces, "\n")
        text = decode_text(body)
        for rows, position in pieces(text, self._row_characters):
            for seen in range(_DOUBTFUL, len(rows) + _DOUBTFUL, _DOUBTFUL):
                self._objects(rows[seen - _DOUBTFUL : seen], found)
                if found.enough:
                    more = sum(text.count(character, position) for character in begins)
                    return found.result(more + max(0, len(rows) - seen))
        return found.result()

    def _quick_csv(self, body: bytes) -> np.ndarray | None:
        """The features of one plain line of numbers, or None if that is not what it is."""
        if len(body) > _QUICK_BYTES or b"_" in body or not body.isascii():
            return None
        body = body.rstrip(b"\r\n")
        fields = body.split(b",")
        if len(fields) != len(self._limits) or b"\n" in body or b"\r" in body:
            return None
        values = []
        try:
            for field, limits, whole in zip(fields, self._limits, self._whole, strict=True):
                value = float(field)
                if not (math.isfinite(value) and limits.permit(value)) or (whole and value % 1):
                    return None
                values.append(value)
        except ValueError:  # a header, an empty or wrong field
            return None
        return np.array([values])

    def _csv(self, text: str) -> np.ndarray:
        text = text.rstrip("\r\n")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        records, found = CsvRecords(text, self._row_characters), _Found(self.features)
        names, header = self.features, False
        for first in records.read(1, count=1):
            # More names than the table has columns are unknown or double in any case.
            some = [name.strip() for name in first[: len(self._names) + 1]]
            header = any(name in self._names or name.casefold() in self._names for name in some)
            if header:
                names = tuple(some)
        places = self._header_places(names)
        if not header:
            records = CsvRecords(text, self._row_characters)
        size, again = _FIRST, dict[int, int]()  # from where pieces of a size that was tried in vain are tried again
        while not records.ended and not found.enough:
            lines = records.lines(size)
            tried = len(lines) >= _BATCH and records.position >= again.get(size, 0)
            if tried and self._batch_csv(lines, names, places, header, found):
                records.skip(lines)
                larger = size * _STEP
                if larger <= _LARGEST and records.position >= again.get(larger, 0):
                    size = larger
                continue
            if tried:
                again[size] = records.position + _STEP * size
            if size > _SMALLEST and len(lines) > _SMALLEST:
                size //= _STEP
            else:
                size = _SMALLEST
                self._texts(records.read(size, count=_DOUBTFUL), names, places, header, found, spans=records.spans)
        return found.result(0 if records.ended else 1 + text.count("\n", records.position))

    def _batch_csv(self, lines: str, names: Sequence[str], places: Sequence[int], header: bool, found: _Found) -> bool:
        """Read many lines by Polars. False, and nothing is found, if some are no records, or many are not in order."""
        width = len(names)
        schema: dict[str, Any] = {str(place): pl.String for place in range(width)}
        schema |= {str(place): pl.Float64 for place in places}
        # Polars refuses all if the first line is too long, and says nothing of an empty last line.
        data = b"0" + b",0" * (width - 1) + b"\n" + lines.removesuffix("\n").encode() + b"\n"
        characters = np.frombuffer(data, np.uint8)
        starts = np.append(0, np.flatnonzero(characters[:-1] == _LINE_END) + 1)
        few = min(_DOUBTFUL, 1 + len(starts) // _STEP)
        doubtful = np.zeros(len(starts), np.bool_)
        commas = characters == _COMMA
        if counted := np.count_nonzero(commas) != len(starts) * (width - 1):
            doubtful = np.add.reduceat(commas, starts, dtype=np.int64) != width - 1
            if np.count_nonzero(doubtful) > few:
                return False
        quote = '"' if b'"' in data else None
        if quote is not None and (np.add.reduceat((characters == _QUOTE).view(np.uint8), starts) & 1).any():
            return False  # a record goes on in the next line
        lenient = {"ignore_errors": True, "truncate_ragged_lines": True, "raise_if_empty": False}
        try:
            frame = read_csv(data, has_header=False, schema=schema, quote_char=quote, **lenient)
        except pl.exceptions.PolarsError:
            return False
        if frame.height != len(starts):
            return False
        frame = frame.slice(1)
        nulls = frame.null_count().row(0)
        values = frame.select(str(place) for place in places).to_numpy(writable=True)
        codes = np.zeros(values.shape, np.uint8, order="F")
        # A line with too few fields has a null in the last column; without such lines the total shows a surplus.
        if nulls[-1] and not counted:
            doubtful = np.add.reduceat(commas, starts, dtype=np.int64) != width - 1
        doubtful = doubtful[1:]
        if any(nulls):
            missing = np.isnan(values)
            codes[missing] = _MISSING
            # So are "nan", a number that is none, and what a comma within quotes leaves to be missed at the end.
            clear = np.count_nonzero(missing) == sum(nulls[place] for place in places)
            clear = clear and sum(nulls) == _empty_fields(characters, quotes=len(places) == width)
            if not clear or doubtful.any():
                doubtful |= missing.any(axis=1)
                if quote:
                    doubtful |= frame.to_series(width - 1).is_null().to_numpy()
        self._check_values(values, codes)
        if codes.any():
            doubtful |= codes.any(axis=1)
        rows = np.flatnonzero(doubtful)
        if not len(rows):
            found.add(values)
            return True
        if len(rows) > few:
            return False
        begins = np.append(starts[1:], len(data))
        try:
            records = [next(csv.reader([data[begins[row] : begins[row + 1]].decode()], strict=True)) for row in rows]
        except csv.Error:
            return False
        self._texts(records, names, places, header, found, (rows, values))
        return True

    def _texts(
        self,
        records: Sequence[list[str]],
        names: Sequence[str],
        places: Sequence[int],
        header: bool,
        found: _Found,
        among: tuple[np.ndarray, np.ndarray] | None = None,
        spans: Mapping[int, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        """Add the records. `spans`: first and last line of those that have several, by index."""
        for index, (first, last) in spans.items():
            record = records[index]
            wrong = len(record) != len(names) or any("\n" in record[place] for place in places)
            if wrong:
                what = f"the record of lines {first} to {last} has a line end within quotes"
                raise RequestError(400, f"{what}; is one of them out of place?")
        malformed: dict[int, str] = {}
        ordered: list[Sequence[str]] = []
        hint = "" if header else f"; without a header a line is {','.join(self.features)}"
        for index, record in enumerate(records):
            if len(record) == len(names):
                ordered.append([record[place] for place in places])
            else:
                malformed[index] = f"{counted(len(record), 'field')}, expected {len(names)}{hint}"
                ordered.append([""] * len(places))
        self._checked(ordered, _from_text, malformed, found, among)

    def _objects(self, rows: Sequence[Any], found: _Found) -> None:
        malformed: dict[int, str] = {}
        ordered: list[Sequence[Any]] = []
        blank = [0.0] * len(self.features)
        for index, row in enumerate(rows):
            ordered.append(blank)
            try:
                if isinstance(row, dict):
                    given = list(row.values())
                    ordered[-1] = [given[place] for place in self._header_places(tuple(row))]
                elif not isinstance(row, list):
                    malformed[index] = f"neither a list nor an object: {shown(row)}"
                elif len(row) != len(self.features):
                    expected = f"expected {len(self.features)}: {', '.join(self.features)}"
                    malformed[index] = f"{counted(len(row), 'value')}, {expected}"
                else:
                    ordered[-1] = row
            except RequestError as error:
                malformed[index] = str(error)
        self._checked(ordered, _from_json, malformed, found)

    def _places(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The position of each feature among `names`. Raises `RequestError` naming what is unknown, double, missing."""
        found: dict[str, int] = {}
        unknown: list[str] = []
        for place, name in enumerate(names):
            column = self._names.get(name) or self._names.get(name.casefold())
            if column is None:
                unknown.append(str(shown(name)))
            elif column in found:
                raise RequestError(400, f"column {column} is given twice")
            else:
                found[column] = place
        missing = [name for name in self.features if name not in found]
        if unknown or missing:
            kinds = {"missing": missing, "unknown": unknown}
            reasons = [f"{kind} columns: {', '.join(some[:20])}" for kind, some in kinds.items() if some]
            raise RequestError(400, f"{'; '.join(reasons)}; the features are {', '.join(self.features)}")
        return tuple(found[name] for name in self.features)

    def _checked(
        self,
        rows: Sequence[Sequence[Any]],
        convert: Callable[[Any, bool], tuple[float, int]],
        malformed: Mapping[int, str],
        found: _Found,
        among: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Add rows to what is found. `malformed`: why a row is none, by its index; it is reported once, as a whole.

        `among`: which ones these are of all the rows whose values are given, the others of which are in order.
        """
        if not rows:
            return
        shape = (len(rows), len(self.features))
        values, codes = _converted(rows, convert, [column.dtype == "bool" for column in self._columns])
        values, codes = values.reshape(shape), codes.reshape(shape)
        skip = list(malformed)
        codes[skip] = _OK
        values[skip] = np.nan
        self._check_values(values, codes, skip=skip)
        numbers, everything = among if among is not None else (np.arange(len(rows)), values)
        if not malformed and not codes.any():
            everything[numbers] = values
            found.add(everything)
            return
        wrong = itertools.islice(np.argwhere(codes), MAX_REPORTED_PROBLEMS)
        problems = [
            {
                "row": int(numbers[row]),
                "column": self.features[place],
                "value": shown(rows[row][place]),
                "reason": self._reason(int(codes[row, place]), self._columns[place]),
            }
            for row, place in wrong
        ]
        for row, reason in itertools.islice(malformed.items(), MAX_REPORTED_PROBLEMS):
            problems.append({"row": int(numbers[row]), "column": None, "value": None, "reason": reason})
        problems.sort(key=lambda problem: problem["row"])
        bad = np.count_nonzero(codes.any(axis=1)) + len(malformed)
        found.add_problems(len(everything), problems, len(malformed) + int(np.count_nonzero(codes)), int(bad))

    def _check_values(self, values: np.ndarray, codes: np.ndarray, skip: Iterable[int] = ()) -> None:
        """Set `codes` where a value is not allowed, and clear them where a null is."""
        for place, column in enumerate(self._columns):
            given = codes[:, place] == _OK
            given[list(skip)] = False
            if column.nullable:
                codes[codes[:, place] == _MISSING, place] = _OK
            x, code = values[:, place], codes[:, place]
            finite = np.isfinite(x)
            code[given & ~finite] = _NOT_FINITE
            given &= finite
            code[given & ~self._limits[place].permit(x)] = _OUTSIDE
            if column.dtype in _WHOLE:
                code[given & (x != np.floor(x))] = _NOT_WHOLE

    @staticmethod
    def _reason(code: int, column: ColumnSpec) -> str:
        allowed = "0 or 1" if column.dtype == "bool" and not column.constraint() else column.constraint()
        expected = f"; allowed: {allowed}" if allowed else ""
        wanted, whole = ("a boolean",) * 2 if column.dtype == "bool" else ("a number", "a whole number")
        return {
            _MISSING: f"missing{expected}",
            _NOT_A_NUMBER: f"not {wanted}{expected}",
            _NOT_FINITE: f"not finite{expected}",
            _NOT_WHOLE: f"not {whole}{expected}",
            _OUTSIDE: f"out of range{expected}",
        }[code]


def _empty_fields(characters: np.ndarray, quotes: bool) -> int:
    """How many fields of several in a line are empty, also those of two `quotes`; no comma is within quotes."""
    comma = characters == _COMMA
    between = comma | (characters == _LINE_END)
    empty = np.count_nonzero((comma[:-1] & between[1:]) | (between[:-1] & comma[1:]))
    if quotes:
        quote = characters == _QUOTE
        empty += np.count_nonzero(between[:-3] & quote[1:-2] & quote[2:-1] & between[3:])
    return int(empty)


def _converted(
    rows: Sequence[Sequence[Any]], convert: Callable[[Any, bool], tuple[float, int]], booleans: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Values and codes, both flat."""
    cells = list(itertools.chain.from_iterable(rows))
    if {*map(type, cells)} <= {int, float}:
        try:
            return np.array(cells, np.float64), np.zeros(len(cells), np.uint8)
        except OverflowError:  # an integer beyond the range of floats: find it
            pass
    pairs = [convert(value, boolean) for value, boolean in zip(cells, itertools.cycle(booleans), strict=False)]
    return np.array([value for value, _ in pairs], np.float64), np.array([code for _, code in pairs], np.uint8)


def _from_text(field: str, boolean: bool) -> tuple[float, int]:
    field = field.strip()
    if not field:
        return math.nan, _MISSING
    if boolean and field.lower() in ("true", "false"):
        return float(field.lower() == "true"), _OK
    try:
        if "_" in field or not field.isascii():  # Python's float reads 1_000 and other scripts' digits
            return math.nan, _NOT_A_NUMBER
        return float(field), _OK
    except ValueError:
        return math.nan, _NOT_A_NUMBER


def _from_json(value: Any, boolean: bool) -> tuple[float, int]:
    kind = type(value)
    if kind is float:
        return value, _OK
    if kind is int or (kind is bool and boolean):
        try:
            return float(value), _OK
        except OverflowError:
            return math.inf, _OK
    return math.nan, _MISSING if value is None else _NOT_A_NUMBER
