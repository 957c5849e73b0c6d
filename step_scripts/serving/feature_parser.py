"""Bodies of inference requests to raw features, checked against the table that the model was trained on.

Accepted: `text/csv` (features in the schema's order, or with a header line in any order and case), `application/json`
(`{"instances": [...]}`, a list of rows, one row) and JSON lines; a row is a list of features in the schema's order or
an object. Other columns of the table (target, keys, event time) may be there and are ignored. Names that differ only in
case or in their Unicode form are the same name.

All of them become rows of cells, which `_FoundRows` turns into numbers and checks. A body is read a piece at a time,
until a hundred problems have been found: a refused one costs no more than one that is answered. Long pieces of CSV are
read by Polars, only the cells that it cannot read one by one. Lines of CSV end with LF, CR LF or CR; a line end in
quotes is allowed in columns that are no features.
"""

from __future__ import annotations

import csv
import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl

from step_scripts.runner.wording import counted
from step_scripts.serving.deployment import CSV, JSON
from step_scripts.serving.request_rows import (
    NOT_A_NUMBER,
    NOT_FINITE,
    CsvRecords,
    Layout,
    RequestError,
    Row,
    csv_rows,
    decode_text,
    json_line_pieces,
    json_number,
    json_pieces,
    shown,
    text_number,
)
from step_scripts.table.spec import ColumnSpec, TableSpec

MAX_REPORTED_PROBLEMS = 100
_BATCH = 4096  # characters from which on Polars is faster than the CSV reader
_FIRST_PIECE, _PIECE = 1 << 14, 1 << 18  # characters of CSV that are given to Polars at once; it may be the last one
_BETWEEN = "\x1f"  # fields, where commas may stand in them
_ROW, _ROW_PER_COLUMN = 1 << 16, 64  # characters that a row may have, at least


class FeatureParser:
    """Turns request bodies into raw features, and refuses what the table does not allow."""

    def __init__(self, table: TableSpec) -> None:
        self.features = table.features
        self._rules = _Rules([table.column(name) for name in table.features])
        folded = [_folded(name) for name in table.column_names]
        self._names = {
            fold: name for fold, name in zip(folded, table.column_names, strict=True) if folded.count(fold) == 1
        }
        self._names |= {name: name for name in table.column_names}
        self._row_characters = max(_ROW, _ROW_PER_COLUMN * len(table.columns))
        self._places = lru_cache(maxsize=256)(self._find_places)

    def parse(self, body: bytes, media: str) -> np.ndarray:
        """Raw features: float64, shape (rows, features), nulls as NaN. Raises `RequestError` 400."""
        text = decode_text(body)
        return self._csv(text) if media == CSV else self._json(text, media)

    def _json(self, text: str, media: str) -> np.ndarray:
        found = _FoundRows(self._rules, json_number)
        pieces, begins = (json_pieces, "[{") if media == JSON else (json_line_pieces, "\n")
        for rows, position in pieces(text, self._row_characters):
            found.add_rows([self._json_row(row) for row in rows])
            if found.enough:
                return found.result(sum(text.count(character, position) for character in begins))
        return found.result()

    def _json_row(self, row: Any) -> Row:
        if isinstance(row, tuple):
            names, values = zip(*row, strict=True) if row else ((), ())
            try:
                return [values[place] for place in self._places(names)]
            except RequestError as error:
                return str(error)
        if not isinstance(row, list):
            return f"neither a list nor an object: {shown(row)}"
        if len(row) != len(self.features):
            return f"{counted(len(row), 'value')}, expected {len(self.features)}: {', '.join(self.features)}"
        return row

    def _csv(self, text: str) -> np.ndarray:
        text = text.rstrip("\r\n")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        records, found = CsvRecords(text, self._row_characters), _FoundRows(self._rules, text_number)
        # More names than the table has columns are unknown or double in any case.
        names = tuple(name.strip() for name in records.read()[: len(self._names) + 1])
        header = any(self._column(name) for name in names)
        if not header:
            names, records = self.features, CsvRecords(text, self._row_characters)
        layout = Layout(
            len(names), self._places(names), "" if header else f"; without a header a line is {','.join(names)}"
        )
        size = _FIRST_PIECE
        while not records.ended and not found.enough:
            lines, size = records.whole_lines(size), _PIECE
            if len(lines) >= _BATCH and self._batch(lines, layout, found):
                records.position, records.line = records.position + len(lines), records.line + lines.count("\n")
                continue
            end = records.position + len(lines)
            while not records.ended and not found.enough:
                found.add_rows(csv_rows(records, layout))
                if records.position >= end:
                    break
        return found.result(records.rest())

    def _batch(self, text: str, layout: Layout, found: _FoundRows) -> bool:
        """Add many lines at once. False, and nothing is added, if not each of them is a record of CSV by itself."""
        lines, count, between = text.removesuffix("\n").split("\n"), len(self.features), ","
        empty = pl.Series(lines, dtype=pl.String) == ""
        if '"' in text:
            quoted = [index for index, line in enumerate(lines) if '"' in line]
            try:
                records = list(csv.reader([lines[index] for index in quoted], strict=True))
            except csv.Error:
                return False
            if len(records) != len(quoted) or _BETWEEN in text:
                return False
            lines, between = text.removesuffix("\n").replace(",", _BETWEEN).split("\n"), _BETWEEN
            for index, record in zip(quoted, records, strict=True):
                lines[index] = _BETWEEN.join(record)
        fields = pl.Series(lines, dtype=pl.String).str.split(between)
        widths = (fields.list.len() * ~empty).to_numpy()
        cells = fields.filter(widths == layout.width).explode()
        rows = np.flatnonzero(widths == layout.width)
        cells = cells.gather((np.arange(len(rows))[:, np.newaxis] * layout.width + layout.places).ravel())
        values = cells.cast(pl.Float64, strict=False).to_numpy(writable=True)
        odd = np.flatnonzero(~np.isfinite(values))
        for place, cell in zip(odd.tolist(), cells.gather(odd), strict=True):
            values[place] = text_number(cell, self._rules.booleans[place % count])
        others = np.flatnonzero(widths != layout.width)[:MAX_REPORTED_PROBLEMS]
        malformed = [(int(row), layout.wrong_width(int(widths[row]))) for row in others]
        found.add(len(lines), values.reshape(len(rows), count), rows, malformed, lambda row, c: cells[row * count + c])
        return True

    def _column(self, name: str) -> str | None:
        return self._names.get(name) or self._names.get(_folded(name))

    def _find_places(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The position of each feature among `names`. Raises `RequestError` naming what is unknown, double, missing."""
        found: dict[str, int] = {}
        unknown: list[str] = []
        for place, name in enumerate(names):
            column = self._column(name)
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


class _Rules:
    """What the features allow, for all rows at once."""

    def __init__(self, columns: Sequence[ColumnSpec]) -> None:
        self.columns = columns
        self.booleans = [column.dtype == "bool" for column in columns]
        self._limits = [column.limits for column in columns]
        self._fractional = np.array([column.dtype not in ("int64", "bool") for column in columns], np.bool_)
        self._nullable = np.array([column.nullable for column in columns], np.bool_)

    def allow(self, values: np.ndarray) -> np.ndarray:
        """Which values are allowed; NaN is a null."""
        allowed = np.isfinite(values)
        allowed &= (values == np.floor(values)) | self._fractional
        for place, limits in enumerate(self._limits):
            allowed[:, place] &= limits.permit(values[:, place])
        return allowed | (np.isnan(values) & self._nullable)

    def reason(self, value: float, place: int) -> str:
        """Why a value is not allowed."""
        column, boolean = self.columns[place], self.booleans[place]
        allowed = column.constraint() or ("0 or 1" if boolean else "")
        if math.isnan(value):
            reason = "missing"
        elif value == NOT_A_NUMBER:
            reason = "not a boolean" if boolean else "not a number"
        elif value == NOT_FINITE:
            reason = "not finite"
        elif column.dtype in ("int64", "bool") and value % 1:
            reason = "not a boolean" if boolean else "not a whole number"
        else:
            reason = "out of range"
        return f"{reason}; allowed: {allowed}" if allowed else reason


class _FoundRows:
    """Rows of a request so far, in pieces, or what is wrong with them. `number` turns a cell into a number."""

    def __init__(self, rules: _Rules, number: Callable[[Any, bool], float]) -> None:
        self._rules, self._number = rules, number
        self._values: list[np.ndarray] = [np.empty((0, len(rules.columns)))]
        self._rows = self._bad_rows = self._total = 0
        self._problems: list[dict[str, Any]] = []

    @property
    def enough(self) -> bool:
        """Whether there are as many problems as are reported: what is wrong beside them changes nothing."""
        return self._total >= MAX_REPORTED_PROBLEMS

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Add some rows."""
        kept = [index for index, row in enumerate(rows) if not isinstance(row, str)]
        malformed = [(index, row) for index, row in enumerate(rows) if isinstance(row, str)]
        self.add(len(rows), self._numbers([rows[i] for i in kept]), kept, malformed, lambda r, c: rows[kept[r]][c])

    def add(
        self,
        count: int,
        values: np.ndarray,
        where: Sequence[int] | np.ndarray,
        malformed: Sequence[tuple[int, str]],
        cell: Callable[[int, int], Any],
    ) -> None:
        """Add `count` rows: numbers and cells of those at `where`, and why the first of the others are no rows."""
        allowed = self._rules.allow(values)
        before, self._rows = self._rows, self._rows + count
        if len(values) == count and allowed.all():
            if not self._problems:
                self._values.append(values)
            return
        self._values.clear()
        wrong = np.argwhere(~allowed)
        problems: list[tuple[int, str | None, Any, str]] = [(row, None, None, reason) for row, reason in malformed]
        for row, place in wrong[:MAX_REPORTED_PROBLEMS]:
            column, reason = self._rules.columns[place].name, self._rules.reason(float(values[row, place]), place)
            problems.append((int(where[row]), column, shown(cell(int(row), int(place))), reason))
        self._problems += [
            {"row": before + 1 + row, "column": column, "value": value, "reason": reason}
            for row, column, value, reason in sorted(problems, key=lambda problem: problem[0])
        ]
        self._total += count - len(values) + len(wrong)
        self._bad_rows += count - len(values) + len(np.unique(wrong[:, 0]))

    def _numbers(self, rows: Sequence[Sequence[Any]]) -> np.ndarray:
        shape = (len(rows), len(self._rules.columns))
        if {*map(type, itertools.chain.from_iterable(rows))} <= {int, float}:
            try:
                values = np.array(rows, np.float64).reshape(shape)
            except OverflowError:  # an integer beyond the range of floats
                values = np.array(math.nan)
            if np.isfinite(values).all():
                return values
        numbers = [list(map(self._number, row, self._rules.booleans)) for row in rows]
        return np.array(numbers, np.float64).reshape(shape)

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


def _folded(name: str) -> str:
    """The same for names that differ only in case or in their Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
