"""Bodies of inference requests to raw features, checked against the table that the model was trained on.

Accepted: `text/csv` (features in the schema's order, or with a header line in any order and case), `application/json`
(`{"instances": [...]}`, a list of rows, one row) and JSON lines; a row is a list of features in the schema's order or
an object. Other columns of the table (target, keys, event time) may be there and are ignored. Names that differ only in
case or in their Unicode form are the same name.

All of them become rows of cells, which `FeatureParser` turns into numbers and checks. A body is read a piece at a time,
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
from step_scripts.serving.media import (
    CSV,
    JSON,
    MAX_REPORTED_PROBLEMS,
    FoundRows,
    RequestError,
    decode_text,
    row_problem,
    shown,
)
from step_scripts.serving.request_rows import (
    NOT_A_NUMBER,
    NOT_FINITE,
    SOME_ROWS,
    CsvRecords,
    Layout,
    Row,
    csv_row,
    csv_rows,
    json_line_pieces,
    json_number,
    json_pieces,
    text_number,
)
from step_scripts.table.column_types import read_csv
from step_scripts.table.spec import ColumnSpec, TableSpec

_BATCH = 4096  # characters from which on Polars is faster than the CSV reader
_PIECE = 1 << 18  # characters of CSV that are given to Polars at once
_ROW, _ROW_PER_COLUMN = 1 << 16, 64  # characters that a row may have, at least
_COMMA, _LINE_END, _QUOTE = b',\n"'


class FeatureParser:
    """Turns request bodies into raw features, and refuses what the table does not allow."""

    def __init__(self, table: TableSpec) -> None:
        self.features = table.features
        self._columns = [table.column(name) for name in table.features]
        self._booleans = [column.dtype == "bool" for column in self._columns]
        self._rules = _Rules(self._columns)
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
        found = FoundRows(self.features)
        pieces, begins = (json_pieces, "[{") if media == JSON else (json_line_pieces, "\n")
        for rows, position in pieces(text, self._row_characters):
            for start in range(0, len(rows), SOME_ROWS):
                self._examine([self._json_row(row) for row in rows[start : start + SOME_ROWS]], json_number, found)
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
        records, found = CsvRecords(text, self._row_characters), FoundRows(self.features)
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
                self._examine(csv_rows(records, layout), text_number, found)
                if records.position >= end:
                    break
        return found.result(records.rest())

    def _batch(self, lines: str, layout: Layout, found: FoundRows) -> bool:
        """Add many lines, read by Polars. False, and nothing is added, if that is not how they can be read."""
        # Polars refuses all if the first line is too long, and says nothing of an empty last line.
        data = b"0" + b",0" * (layout.width - 1) + b"\n" + lines.removesuffix("\n").encode() + b"\n"
        quote = '"' if b'"' in data else None
        if quote and len(layout.places) < layout.width:
            return False  # what is wrong with the quotes of a column that is no feature would not be seen
        characters = np.frombuffer(data, np.uint8)
        starts = np.append(0, np.flatnonzero(characters == _LINE_END) + 1)
        suspect = np.add.reduceat(characters == _COMMA, starts[:-1], dtype=np.int64) != layout.width - 1
        suspect |= np.diff(starts) == 1  # an empty line
        if quote and (np.add.reduceat(characters == _QUOTE, starts[:-1], dtype=np.int64) & 1).any():
            return False  # a record goes on in the next line
        if np.count_nonzero(suspect) > SOME_ROWS:
            return False
        values = self._read(data, layout, quote)
        if values is None or len(values) != len(suspect):
            return False
        values, suspect, starts = values[1:], suspect[1:], starts[1:]
        suspect |= ~self._rules.allow(values).all(axis=1)
        positions = np.flatnonzero(suspect)
        if len(positions) > SOME_ROWS:
            return False
        try:
            records = [next(csv.reader([data[starts[n] : starts[n + 1]].decode()], strict=True)) for n in positions]
        except csv.Error:
            return False
        self._examine([csv_row(record, layout) for record in records], text_number, found, positions, values)
        return True

    def _read(self, data: bytes, layout: Layout, quote: str | None) -> np.ndarray | None:
        """The features as Polars reads them, not a number where there may be something wrong; None where it fails."""
        schema: dict[str, Any] = dict.fromkeys(map(str, range(layout.width)), pl.String)
        schema |= {str(place): pl.Float64 for place in layout.places}
        # With errors ignored, what is no number is null, too. Where a column may be empty they are told apart.
        for ignore_errors in (False, True) if self._rules.some_nullable else (True,):
            try:
                frame = read_csv(
                    data, has_header=False, schema=schema, quote_char=quote, ignore_errors=ignore_errors,
                    truncate_ragged_lines=True, raise_if_empty=False,
                )  # fmt: skip
            except pl.exceptions.PolarsError:
                continue
            frame = frame.select(map(str, layout.places))
            values = frame.to_numpy(writable=True)
            missing = np.isnan(values)
            if ignore_errors or np.count_nonzero(missing) != sum(frame.null_count().row(0)):
                values[missing] = NOT_A_NUMBER
            return values
        return None

    def _examine(
        self,
        rows: Sequence[Row],
        number: Callable[[Any, bool], float],
        found: FoundRows,
        positions: np.ndarray | None = None,
        among: np.ndarray | None = None,
    ) -> None:
        """Add rows to what is found.

        `among`: the values of more rows, all of them allowed but for those at `positions`, which these rows are.
        """
        kept = [index for index, row in enumerate(rows) if not isinstance(row, str)]
        values = self._numbers([rows[index] for index in kept], number)
        allowed = self._rules.allow(values)
        if len(kept) == len(rows) and allowed.all():
            if among is not None:
                among[positions] = values
            found.add(values if among is None else among)
            return
        wrong = np.argwhere(~allowed)
        where = np.arange(len(rows)) if positions is None else positions
        malformed = [(index, row) for index, row in enumerate(rows) if isinstance(row, str)]
        problems = [
            row_problem(where[index], None, None, reason) for index, reason in malformed[:MAX_REPORTED_PROBLEMS]
        ]
        for row, place in wrong[:MAX_REPORTED_PROBLEMS]:
            reason, cell = self._reason(float(values[row, place]), self._columns[place]), rows[kept[row]][place]
            problems.append(row_problem(where[kept[row]], self.features[place], shown(cell), reason))
        problems.sort(key=lambda problem: problem["row"])
        bad_rows = len(malformed) + len(np.unique(wrong[:, 0]))
        found.add_problems(problems, len(malformed) + len(wrong), bad_rows, len(rows if among is None else among))

    def _numbers(self, rows: Sequence[Sequence[Any]], number: Callable[[Any, bool], float]) -> np.ndarray:
        if {*map(type, itertools.chain.from_iterable(rows))} <= {int, float}:
            try:
                values = np.array(rows, np.float64).reshape(len(rows), len(self.features))
            except OverflowError:  # an integer beyond the range of floats
                values = np.array(math.nan)
            if np.isfinite(values).all():
                return values
        numbers = [list(map(number, row, self._booleans)) for row in rows]
        return np.array(numbers, np.float64).reshape(len(rows), len(self.features))

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

    @staticmethod
    def _reason(value: float, column: ColumnSpec) -> str:
        boolean = column.dtype == "bool"
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


class _Rules:
    """What the columns allow, for all rows at once."""

    def __init__(self, columns: Sequence[ColumnSpec]) -> None:
        self._limits = [column.limits for column in columns]
        self._fractional = np.array([column.dtype not in ("int64", "bool") for column in columns], np.bool_)
        self._nullable = np.array([column.nullable for column in columns], np.bool_)
        self.some_nullable = bool(self._nullable.any())

    def allow(self, values: np.ndarray) -> np.ndarray:
        """Which values are allowed; NaN is a null."""
        allowed = np.isfinite(values)
        allowed &= (values == np.floor(values)) | self._fractional
        for place, limits in enumerate(self._limits):
            allowed[:, place] &= limits.permit(values[:, place])
        if self.some_nullable:
            allowed |= np.isnan(values) & self._nullable
        return allowed


def _folded(name: str) -> str:
    """The same for names that differ only in case or in their Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
