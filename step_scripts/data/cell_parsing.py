"""From the records of a CSV fragment to typed columns, and what is wrong with which cell."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import polars as pl

from step_scripts.data.csv_records import Records
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import polars_schema
from step_scripts.table.constraints import VIOLATION_SCHEMA, violations
from step_scripts.table.polars_csv import read_csv
from step_scripts.table.spec import ColumnSpec, DType, TableSpec

_READ_AS_NUMBERS = ("int64", "float64")
_LARGEST_EXACT = 2**53
_SHOWN_CHARACTERS = 100
_NOT_A: dict[DType, str] = {
    "int64": "is not a whole number",
    "float64": "is not a number",
    "bool": "is none of true, false, 1, 0",
    "datetime": "is not a time such as 2024-05-01T12:00:00Z",
    "string": "is not a text",
}


@dataclass(frozen=True)
class ParsedRows:
    """`frame`: the table's columns, typed, one row a record. `faults`: row, column, value (as in the file), problem."""

    frame: pl.DataFrame
    faults: pl.DataFrame


def parse_rows(
    records: Records, positions: tuple[int, ...], fields: int, delimiter: str, table: TableSpec
) -> ParsedRows:
    """Parse the records, and find the values that the table does not permit.

    `positions` are the indices of the table's columns among the `fields` fields. Cells that do not parse are null in
    the frame and listed among the faults, at most one fault a cell. Raises `polars.exceptions.ComputeError` if a record
    has too many fields.
    """
    types = dict(zip(positions, polars_schema(table).values(), strict=True))
    read = _read(records.data, records.quoted, fields, delimiter, types)
    if read.height != len(records.lines):
        raise RuntimeError(f"{counted(read.height, 'record')} read, {len(records.lines)} counted")
    columns = [read[_name(position)].alias(c.name) for c, position in zip(table.columns, positions, strict=True)]
    problems = []
    suspects = _suspects(columns, table)
    if len(suspects):
        texts = _read(records.text_of(suspects), records.quoted, fields, delimiter, {})
        for index, (column, position) in enumerate(zip(table.columns, positions, strict=True)):
            columns[index], problem = _examined(columns[index], texts[_name(position)], suspects, column)
            problems.append(problem)
    for index, column in enumerate(table.columns):
        if column.dtype not in _READ_AS_NUMBERS:
            columns[index], problem = _converted(columns[index], column)
            problems.append(problem)
    frame = pl.DataFrame(columns)
    faults = pl.concat([*problems, violations(frame, table)]).unique(
        ["row", "column"], keep="first", maintain_order=True
    )
    if faults.is_empty():
        return ParsedRows(frame, faults.insert_column(2, pl.Series("value", [], pl.String)))
    return ParsedRows(frame, _with_values(faults, records, positions, fields, delimiter, table))


def _name(position: int) -> str:
    return f"column_{position + 1}"


def _read(data: bytes, quoted: bool, fields: int, delimiter: str, types: Mapping[int, pl.DataType]) -> pl.DataFrame:
    """All fields: integers and floats where `types` asks for them, null where a cell is none; else texts."""
    numbers = {i: t for i, t in types.items() if t.is_numeric()}
    return read_csv(
        data,
        has_header=False,
        schema={_name(i): numbers.get(i, pl.String()) for i in range(fields)},
        separator=delimiter,
        quote_char='"' if quoted else None,
        ignore_errors=True,
        raise_if_empty=False,
    )


def _suspects(columns: Sequence[pl.Series], table: TableSpec) -> np.ndarray:
    """Rows in which a number is null, and may be one that the reader does not understand."""
    nulls = [
        cells.is_null()
        for cells, column in zip(columns, table.columns, strict=True)
        if column.dtype in _READ_AS_NUMBERS and cells.null_count()
    ]
    return reduce(operator.or_, nulls).arg_true().to_numpy() if nulls else np.empty(0, np.uint32)


def _examined(
    cells: pl.Series, texts: pl.Series, rows: np.ndarray, column: ColumnSpec
) -> tuple[pl.Series, pl.DataFrame]:
    """The cells of a number column with those of `rows` parsed again from their texts, and what is wrong with them."""
    if column.dtype not in _READ_AS_NUMBERS:
        return cells, _problem([], column.name, "")
    texts = texts.str.strip_chars()
    numbers = _parsed(texts, column)
    wrong = numbers.is_null() & texts.is_not_null() & (texts != "")
    problem = _problem(rows[wrong.to_numpy()], column.name, _NOT_A[column.dtype])
    as_read = cells.gather(rows)
    if as_read.equals(numbers, null_equal=True):  # the reader was right; to put them in copies the column
        return cells, problem
    return cells.scatter(rows, numbers), problem


def _converted(texts: pl.Series, column: ColumnSpec) -> tuple[pl.Series, pl.DataFrame]:
    """A text column as the column's type, and what is wrong."""
    texts = _blank_to_null(texts)
    if column.dtype == "string":
        return texts, _problem([], column.name, "")
    cells = _parsed(texts.str.strip_chars(), column)
    wrong = texts.is_not_null() & cells.is_null()
    return cells, _problem(wrong.arg_true(), column.name, _NOT_A[column.dtype])


def _with_values(
    faults: pl.DataFrame, records: Records, positions: tuple[int, ...], fields: int, delimiter: str, table: TableSpec
) -> pl.DataFrame:
    """The faults with the text of each cell, in order of row and column."""
    rows = faults["row"].unique().sort()
    texts = _read(records.text_of(rows.to_numpy()), records.quoted, fields, delimiter, {}).with_columns(
        rows.alias("row")
    )
    order = {name: index for index, name in enumerate(table.column_names)}
    valued = [
        group.join(texts.select("row", pl.col(_name(positions[order[str(name)]])).alias("value")), on="row", how="left")
        for (name,), group in faults.group_by("column")
    ]
    shown = pl.col("value").fill_null("").str.strip_chars().str.slice(0, _SHOWN_CHARACTERS)
    place = pl.col("column").replace_strict(order, return_dtype=pl.UInt32)
    return pl.concat(valued).select("row", "column", shown, "problem").sort("row", place)


def _blank_to_null(texts: pl.Series) -> pl.Series:
    blank = texts.str.strip_chars() == ""
    return texts.to_frame().select(pl.when(~blank).then(pl.col(texts.name))).to_series() if blank.any() else texts


def _parsed(texts: pl.Series, column: ColumnSpec) -> pl.Series:
    """Texts without surrounding blanks as the column's type; null where that is impossible."""
    if column.dtype == "float64":
        return texts.cast(pl.Float64, strict=False)
    if column.dtype == "int64":
        whole = pl.col("text").cast(pl.Int64, strict=False)
        number = pl.col("text").cast(pl.Float64, strict=False)
        exact = (number == number.floor()) & (number.abs() <= _LARGEST_EXACT)
        as_whole = pl.when(exact).then(number).cast(pl.Int64, strict=False)
        return pl.DataFrame({"text": texts}).select(pl.coalesce(whole, as_whole)).to_series()
    if column.dtype == "bool":
        values = {"true": True, "1": True, "false": False, "0": False}
        return texts.str.to_lowercase().replace_strict(values, default=None, return_dtype=pl.Boolean)
    return _parsed_times(texts)


def _parsed_times(texts: pl.Series) -> pl.Series:
    """ISO 8601 dates and times; UTC where no offset is given."""
    complete = (
        texts.str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00:00")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})[ t](\d)", "${1}T${2}")
        .str.replace(r"^(.{10}T\d{2}:\d{2})(Z|z|[+-].*)?$", "${1}:00${2}")
        .str.replace(r"([+-]\d{2})(\d{2})$", "${1}:${2}")
        .str.replace(r"^(.{10}T[\d:.]+)$", "${1}Z")
    )
    return complete.str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False)


def _problem(rows: np.ndarray | pl.Series | list[int], column: str, problem: str) -> pl.DataFrame:
    columns = {"row": pl.Series(rows, dtype=pl.UInt32), "column": column, "problem": problem}
    return pl.DataFrame(columns, schema=VIOLATION_SCHEMA)
