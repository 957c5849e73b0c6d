"""Bodies of inference requests to raw features, checked against the table that the model was trained on.

Accepted: `text/csv` (features in the schema's order, or with a header line in any order and case), `application/json`
(`{"instances": [...]}`, a list of rows, one row) and JSON lines; a row is a list of features in the schema's order or
an object. Other columns of the table (target, keys, event time) may be there and are ignored.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl

from step_scripts.serving_io import (
    CSV,
    JSON,
    MAX_REPORTED_PROBLEMS,
    RequestError,
    csv_records,
    decode_text,
    json_rows,
    load_json,
    shown,
)
from step_scripts.table import ColumnSpec, TableSpec

_QUICK_BYTES = 2048  # of a single CSV line that is tried without the CSV reader
_BATCH_BYTES = 4096  # from here on Polars is faster than the CSV reader
_OK, _MISSING, _NOT_A_NUMBER, _NOT_FINITE, _NOT_WHOLE, _OUTSIDE = range(6)
_WHOLE = ("int64", "bool")
_ABSENT = object()


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
        self._bounds = [_bounds(column) for column in self._columns]
        self._quick_rules = [
            (low, high, column.dtype in _WHOLE, frozenset(column.isin) if column.isin is not None else None)
            for column, (low, high) in zip(self._columns, self._bounds, strict=True)
        ]
        self._header_places = lru_cache(maxsize=256)(self._places)

    def parse(self, body: bytes, media: str) -> np.ndarray:
        """Raw features: float64, shape (rows, features), nulls as NaN. Raises `RequestError` 400."""
        if media == CSV:
            quick = self._quick_csv(body)
            return quick if quick is not None else self._csv(body)
        if media == JSON:
            return self._objects(json_rows(load_json(decode_text(body), "the body")))
        lines = enumerate(decode_text(body).split("\n"), start=1)
        return self._objects([load_json(line, f"line {n}") for n, line in lines if line.strip()])

    def _quick_csv(self, body: bytes) -> np.ndarray | None:
        """The features of one plain line of numbers, or None if that is not what it is."""
        if len(body) > _QUICK_BYTES or b"_" in body or not body.isascii():
            return None
        fields = body.split(b",")
        if len(fields) != len(self._quick_rules):
            return None
        values = []
        try:
            for field, (low, high, whole, allowed) in zip(fields, self._quick_rules, strict=True):
                value = float(field)
                if not low <= value <= high or (whole and value % 1) or (allowed is not None and value not in allowed):
                    return None
                values.append(value)
        except ValueError:  # several lines, a header, an empty or wrong field
            return None
        return np.array([values])

    def _csv(self, body: bytes) -> np.ndarray:
        text = decode_text(body).rstrip("\r\n")
        first = next(csv_records(text[: text.find("\n") + 1] or text), [])
        header = any(name.strip() in self._names or name.strip().casefold() in self._names for name in first)
        names = tuple(name.strip() for name in first) if header else self.features
        places = self._header_places(names)
        if len(body) >= _BATCH_BYTES:
            batch = self._batch_csv(text, len(names), places, header)
            if batch is not None:
                return batch
        records = list(itertools.islice(csv_records(text), 1 if header else 0, None))
        problems: list[dict[str, Any]] = []
        for number, record in enumerate(records, start=1):
            if len(record) != len(names):
                hint = "" if header else f"; without a header a line is {','.join(self.features)}"
                reason = f"{len(record)} fields, expected {len(names)}{hint}"
                problems.append({"row": number, "column": None, "value": None, "reason": reason})
                record[:] = [*record, *[""] * len(names)][: len(names)]
        return self._checked([[row[place] for place in places] for row in records], _from_text, problems)

    def _batch_csv(self, text: str, width: int, places: Sequence[int], header: bool) -> np.ndarray | None:
        """The features of many lines by Polars, or None if any of them is not in order."""
        schema: dict[str, Any] = {str(place): pl.String for place in range(width)}
        schema |= {str(place): pl.Float64 for place in places}
        try:
            frame = pl.read_csv(
                io.BytesIO(text.encode()), has_header=False, skip_rows=int(header), schema=schema, raise_if_empty=False
            )
        except pl.exceptions.PolarsError:
            return None
        # A line with too many fields was an error; equal totals then mean that none has too few.
        commas = text.count(",") - (text.partition("\n")[0].count(",") if header else 0)
        if not frame.height or commas != frame.height * (width - 1):
            return None
        frame = frame.select(str(place) for place in places)
        values = frame.to_numpy()
        codes = np.zeros(values.shape, np.uint8)
        for place, count in enumerate(frame.null_count().row(0)):
            if count:
                codes[frame.to_series(place).is_null().to_numpy(), place] = _MISSING
        self._check_values(values, codes)
        return None if codes.any() else values

    def _objects(self, rows: Sequence[Any]) -> np.ndarray:
        problems: list[dict[str, Any]] = []
        ordered: list[Sequence[Any]] = []
        blank = [_ABSENT] * len(self.features)
        for number, row in enumerate(rows, start=1):
            ordered.append(blank)
            try:
                if isinstance(row, dict):
                    given = list(row.values())
                    ordered[-1] = [given[place] for place in self._header_places(tuple(row))]
                elif not isinstance(row, list):
                    raise RequestError(400, f"neither a list nor an object: {shown(row)}")
                elif len(row) != len(self.features):
                    expected = f"expected {len(self.features)}: {', '.join(self.features)}"
                    raise RequestError(400, f"{len(row)} values, {expected}")
                else:
                    ordered[-1] = row
            except RequestError as error:
                problems.append({"row": number, "column": None, "value": None, "reason": str(error)})
        return self._checked(ordered, _from_json, problems)

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
        problems: list[dict[str, Any]],
    ) -> np.ndarray:
        if not rows:
            raise RequestError(400, "the request has no rows")
        shape = (len(rows), len(self.features))
        values, codes = _converted(rows, convert, [column.dtype == "bool" for column in self._columns])
        values, codes = values.reshape(shape), codes.reshape(shape)
        malformed = {problem["row"] - 1 for problem in problems}
        codes[sorted(malformed)] = _OK  # such a row is reported once, as a whole
        values[sorted(malformed)] = np.nan
        self._check_values(values, codes, skip=malformed)
        total = len(problems) + int(np.count_nonzero(codes))
        if not total:
            return values
        cells = [
            {
                "row": int(row) + 1,
                "column": self.features[place],
                "value": shown(rows[row][place]),
                "reason": self._reason(int(codes[row, place]), self._columns[place]),
            }
            for row, place in np.argwhere(codes)[:MAX_REPORTED_PROBLEMS]
        ]
        reported = sorted([*problems, *cells], key=lambda problem: problem["row"])[:MAX_REPORTED_PROBLEMS]
        bad_rows = len(malformed | set(np.flatnonzero(codes.any(axis=1)).tolist()))
        where = f"row {reported[0]['row']}" + (f", {reported[0]['column']}" if reported[0]["column"] else "")
        summary = f"{bad_rows} of {len(rows)} rows cannot be used; first: {where}: {reported[0]['reason']}"
        raise RequestError(400, summary, reported, total)

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
            low, high = self._bounds[place]
            wrong = (x < low) | (x > high)
            if column.isin is not None:
                wrong |= ~np.isin(x, [float(value) for value in column.isin])
            code[given & wrong] = _OUTSIDE
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


def _bounds(column: ColumnSpec) -> tuple[float, float]:
    """Inclusive bounds that let exactly the allowed finite numbers through."""
    low, high = (0.0, 1.0) if column.dtype == "bool" else (-math.inf, math.inf)
    low = max(low, column.ge if column.ge is not None else -math.inf)
    high = min(high, column.le if column.le is not None else math.inf)
    if column.gt is not None:
        low = max(low, math.nextafter(column.gt, math.inf))
    if column.lt is not None:
        high = min(high, math.nextafter(column.lt, -math.inf))
    largest = float(np.finfo(np.float64).max)
    return max(low, -largest), min(high, largest)


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
