"""Bodies of inference requests to raw features, checked against the table that the model was trained on.

Accepted: `text/csv` (features in the schema's order, or with a header line in any order and case), `application/json`
(`{"instances": [...]}`, a list of rows, one row) and JSON lines; a row is a list of features in the schema's order or
an object. Other columns of the table (target, keys, event time) may be there and are ignored. Names that differ only in
case or in their Unicode form are the same name.

All of them become rows of cells, which `_FoundRows` turns into numbers and checks. A body is read a piece at a time,
until a hundred problems have been found: a refused one costs no more than one that is answered. Long pieces of CSV are
read by Polars; only the lines that it cannot read, or whose values are not allowed, are looked at one by one. Lines of
CSV end with LF, CR LF or CR; a line end in quotes is allowed in columns that are no features.
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
    SOME_ROWS,
    CsvRecords,
    Layout,
    RequestError,
    Row,
    csv_row,
    csv_rows,
    decode_text,
    json_line_pieces,
    json_number,
    json_pieces,
    shown,
    text_number,
)
from step_scripts.table.column_types import read_csv
from step_scripts.table.spec import ColumnSpec, TableSpec

MAX_REPORTED_PROBLEMS = 100
_BATCH = 4096  # characters from which on Polars is faster than the CSV reader
_PIECE = 1 << 18  # characters of CSV that are given to Polars at once
_ROW, _ROW_PER_COLUMN = 1 << 16, 64  # characters that a row may have, at least
_COMMA, _LINE_END, _QUOTE = b',\n"'


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
            for start in range(0, len(rows), SOME_ROWS):
                found.add([self._json_row(row) for row in rows[start : start + SOME_ROWS]])
                if found.enough:
                    rest = sum(text.count(character, position) for character in begins)
                    return found.result(rest + max(0, len(rows) - start - SOME_ROWS))
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
        while not records.ended and not found.enough:
            lines = records.whole_lines(_PIECE)
            if len(lines) >= _BATCH and self._batch(lines, layout, found):
                records.skip(lines)
                continue
            end = records.position + len(lines)
            while not records.ended and not found.enough:
                found.add(csv_rows(records, layout))
                if records.position >= end:
                    break
        return found.result(records.rest())

    def _batch(self, lines: str, layout: Layout, found: _FoundRows) -> bool:
        """Add many lines, read by Polars. False, and nothing is added, if that is not how they can be read."""
        # Polars refuses all if the first line is too long, and says nothing of an empty last line.
        data = b"0" + b",0" * (layout.width - 1) + b"\n" + lines.removesuffix("\n").encode() + b"\n"
        characters = np.frombuffer(data, np.uint8)
        starts = np.append(0, np.flatnonzero(characters == _LINE_END) + 1)

        def in_each_line(character: int) -> np.ndarray:
            return np.add.reduceat(characters == character, starts[:-1], dtype=np.int64)

        quote = '"' if b'"' in data else None
        # What is wrong with the quotes of a column that is no feature would not be seen, nor a record of two lines.
        if quote and (len(layout.places) < layout.width or (in_each_line(_QUOTE) & 1).any()):
            return False
        suspect = (in_each_line(_COMMA) != layout.width - 1) | (np.diff(starts) == 1)  # an empty line
        if np.count_nonzero(suspect) > SOME_ROWS:
            return False
        try:
            cells = read_csv(
                data, has_header=False, schema=dict.fromkeys(map(str, range(layout.width)), pl.String),
                quote_char=quote, truncate_ragged_lines=True, raise_if_empty=False,
            ).select(map(str, layout.places))  # fmt: skip
        except pl.exceptions.PolarsError:
            return False
        if len(cells) != len(suspect):
            return False
        values = cells.cast(pl.Float64, strict=False).to_numpy(writable=True)
        if (missing := np.isnan(values)).any():
            values[missing & cells.select(pl.all().is_not_null()).to_numpy()] = NOT_A_NUMBER
        values, suspect, starts = values[1:], suspect[1:], starts[1:]
        suspect |= ~self._rules.allow(values).all(axis=1)
        positions = np.flatnonzero(suspect)
        if len(positions) > SOME_ROWS:
            return False
        try:
            records = [next(csv.reader([data[starts[n] : starts[n + 1]].decode()], strict=True)) for n in positions]
        except csv.Error:
            return False
        found.add([csv_row(record, layout) for record in records], positions, values)
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

    def add(
        self, rows: Sequence[Row], positions: Sequence[int] | np.ndarray | None = None, among: np.ndarray | None = None
    ) -> None:
        """Add rows. `among`: the values of more rows, all allowed but those at `positions`, which these rows are."""
        kept = [index for index, row in enumerate(rows) if not isinstance(row, str)]
        values = self._numbers([rows[index] for index in kept])
        allowed = self._rules.allow(values)
        before, added = self._rows, len(rows if among is None else among)
        self._rows += added
        if len(kept) == len(rows) and allowed.all():
            if among is not None:
                among[positions] = values
            if not self._problems:
                self._values.append(values if among is None else among)
            return
        self._values.clear()
        wrong = np.argwhere(~allowed)
        malformed = [(index, None, None, row) for index, row in enumerate(rows) if isinstance(row, str)]
        problems: list[tuple[int, str | None, Any, str]] = [*malformed[:MAX_REPORTED_PROBLEMS]]
        for row, place in wrong[:MAX_REPORTED_PROBLEMS]:
            cell, reason = rows[kept[row]][place], self._rules.reason(float(values[row, place]), place)
            problems.append((kept[row], self._rules.columns[place].name, shown(cell), reason))
        where = range(len(rows)) if positions is None else positions
        self._problems += [
            {"row": before + 1 + int(where[index]), "column": column, "value": value, "reason": reason}
            for index, column, value, reason in sorted(problems, key=lambda problem: problem[0])
        ]
        self._total += len(malformed) + len(wrong)
        self._bad_rows += len(malformed) + len(np.unique(wrong[:, 0]))

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
