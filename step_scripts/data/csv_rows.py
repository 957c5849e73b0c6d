"""From the text of a CSV fragment to typed rows, and what is wrong with which cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import polars as pl

from step_scripts.data.csv_header import CsvFile, check_text
from step_scripts.data.csv_text import DamagedText, Records, blank_bytes, count_lines, split_records
from step_scripts.parameters import ValidateSourceParams
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import VIOLATION_SCHEMA, polars_schema, read_csv, violations
from step_scripts.table.spec import ColumnSpec, DType, TableSpec

_LARGEST_EXACT = 2**53
_SHOWN_BYTES = 60
_SHOWN_CHARACTERS = 100
_NOT_A: dict[DType, str] = {
    "int64": "is not a whole number",
    "float64": "is not a number",
    "bool": "is none of true, false, 1, 0",
    "datetime": "is not a time such as 2024-05-01T12:00:00Z",
    "string": "is not a text",
}
LINE = "_line"
REJECTIONS = {
    "line": pl.Int64(),
    "column": pl.String(),
    "value": pl.String(),
    "reason": pl.String(),
    "problem": pl.String(),
}
"""Columns of a table of rejected cells. `problem` is the reason without what belongs to one row only."""


class RowCounts(NamedTuple):
    """Rows that were found, and the rejected ones among them, with the lines that they take.

    `malformed` rows, without the header's number of fields, are rejected, too.
    """

    records: int = 0
    record_lines: int = 0
    rejected: int = 0
    rejected_lines: int = 0
    malformed: int = 0

    @classmethod
    def total(cls, counts: Iterable[RowCounts]) -> RowCounts:
        """Of different rows."""
        return cls(*map(sum, zip(*counts, strict=True)))

    @property
    def rejected_fraction(self) -> float:
        """Of rows or of lines: a row that takes many lines may be many rows, swallowed by a stray quote."""
        return max(self.rejected / self.records, self.rejected_lines / self.record_lines)


def read_rows(
    data: bytes, offset: int, file: CsvFile, params: ValidateSourceParams
) -> tuple[pl.DataFrame, pl.DataFrame, RowCounts]:
    """The accepted rows, with the table's columns and `LINE`, the rejected cells (`REJECTIONS`), and counts.

    `data` are lines of `file` from byte `offset` on, as `with_newlines` returned them. Raises `DamagedText` for a fault
    that makes other lines doubtful, too.
    """
    check_text(data, offset)
    records, frame, faults = _parse(data, file, params)
    wrong = faults["row"].unique()
    rows = frame.with_columns(pl.Series(LINE, records.lines))
    accepted = rows.filter(~pl.int_range(pl.len(), dtype=pl.UInt32).is_in(wrong.implode())) if len(wrong) else rows
    malformed_lines = sum(row.lines for row in records.malformed_rows)
    counts = RowCounts(
        records=rows.height + len(records.malformed_rows),
        record_lines=int(records.spans.sum()) + malformed_lines,
        rejected=len(wrong) + len(records.malformed_rows),
        rejected_lines=int(records.spans[wrong.to_numpy()].sum()) + malformed_lines,
        malformed=len(records.malformed_rows),
    )
    return accepted, _rejected(records, faults, file.fields), counts


def _parse(data: bytes, file: CsvFile, params: ValidateSourceParams) -> tuple[Records, pl.DataFrame, pl.DataFrame]:
    columns = zip(params.table.columns, file.positions, strict=True)
    split = partial(
        split_records,
        delimiter=params.delimiter,
        fields=file.fields,
        max_line_bytes=params.max_line_bytes,
        single_line={position: column.name for column, position in columns if column.dtype != "string"},
    )
    terminated = data if data[-1:] in (b"\n", b"") else data + b"\n"  # Polars is lax on a last line without
    records = split(terminated)
    if terminated is not data and params.unterminated_last_row == "refuse":
        _check_last_line(data, params.delimiter)
    try:
        return records, *_parse_rows(records, file, params)
    except pl.exceptions.PolarsError:  # as many fields are missing in some records as others have too many
        records = split(terminated, exact=True)
        return records, *_parse_rows(records, file, params)


def _check_last_line(data: bytes, delimiter: str) -> None:
    """Raise `DamagedText` if the text, which has no line end at its end, may have been cut off in a row."""
    text = data[data.rfind(b"\n") + 1 :]
    if text.strip(blank_bytes(delimiter)):
        shown = text[-_SHOWN_BYTES:].decode("utf-8", errors="ignore")
        problem = (
            f"the last row ends in {shown!r}, without the line end that other rows have: was the file cut off? "
            "Copy or export it again, or set unterminated_last_row to accept if it is complete"
        )
        raise DamagedText(count_lines(data) + 1, problem)


def _parse_rows(records: Records, file: CsvFile, params: ValidateSourceParams) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Parse the records, and find the values that the table does not permit.

    The first frame holds the table's columns, typed, one row a record, with null for cells that do not parse. The
    second one lists the faults, at most one a cell: row, column, problem, value (as in the file). Raises
    `polars.exceptions.ComputeError` if a record has too many fields.
    """
    table = params.table
    names = [f"column_{position + 1}" for position in file.positions]
    numbers = {n: t for n, t in zip(names, polars_schema(table).values(), strict=True) if t.is_numeric()}

    def cells_of(data: bytes, types: Mapping[str, pl.DataType]) -> pl.DataFrame:
        """The table's fields: texts, or numbers where `types` asks for them, null where a cell is none."""
        every = [f"column_{number}" for number in range(1, file.fields + 1)]
        return (
            read_csv(
                data,
                has_header=False,
                schema={name: types.get(name, pl.String()) for name in every},
                separator=params.delimiter,
                quote_char='"' if b'"' in data else None,
                ignore_errors=True,
                raise_if_empty=False,
            )
            .select(names)
            .rechunk()
        )

    read = cells_of(records.data, numbers)
    if read.height != len(records.lines):
        raise RuntimeError(f"{counted(read.height, 'record')} read, {len(records.lines)} counted")
    frame = _typed(read, table)
    # Few rows are looked at in detail: those with a number that the reader did not understand, or a wrong cell.
    doubtful = [violations(frame, table)["row"]]
    for cells, name in zip(frame, names, strict=True):
        if cells.null_count() and cells.dtype != pl.String:
            unread = cells.is_null() if name in numbers else cells.is_null() & (read[name].str.strip_chars() != "")
            doubtful.append(unread.arg_true().cast(pl.UInt32))
    rows = pl.concat(doubtful).unique().sort()
    if rows.is_empty():
        return frame, pl.DataFrame(schema={**VIOLATION_SCHEMA, "value": pl.String()})
    texts = cells_of(records.text_of(rows.to_numpy()), {})
    exact = _typed(texts, table)
    columns = list(frame)
    for index, cells in enumerate(exact):
        if not columns[index].gather(rows).equals(cells, null_equal=True):  # to put them in copies the column
            columns[index] = columns[index].scatter(rows, cells)
    return pl.DataFrame(columns), _faults(exact, texts, rows, table)


def _faults(exact: pl.DataFrame, texts: pl.DataFrame, rows: pl.Series, table: TableSpec) -> pl.DataFrame:
    """What is wrong with the cells of `exact`, in order of row and column. `rows` are the numbers of its rows."""
    texts.columns = exact.columns
    cells = texts.with_row_index("row").unpivot(index="row", variable_name="column")
    unread = pl.col("column").replace_strict({column.name: _NOT_A[column.dtype] for column in table.columns})
    return (
        cells.with_columns(
            pl.col("value").str.strip_chars().fill_null(""),
            exact.select(pl.all().is_null()).unpivot()["value"].alias("null"),
        )
        .join(violations(exact, table), on=["row", "column"], how="left", maintain_order="left")
        .with_columns(
            pl.when(pl.col("null") & (pl.col("value") != "")).then(unread).otherwise("problem").alias("problem")
        )
        .filter(pl.col("problem").is_not_null())
        .sort("row", maintain_order=True)
        .select(
            pl.lit(rows).gather("row").alias("row"),
            "column",
            "problem",
            pl.col("value").str.slice(0, _SHOWN_CHARACTERS),
        )
    )


def _typed(frame: pl.DataFrame, table: TableSpec) -> pl.DataFrame:
    """The columns, numbers or texts as they are read, under the table's names and in its types."""
    return pl.DataFrame(
        [_parsed(cells, column).alias(column.name) for cells, column in zip(frame, table.columns, strict=True)]
    )


def _parsed(cells: pl.Series, column: ColumnSpec) -> pl.Series:
    """Texts as the column's type; null where they are blank, or that is impossible."""
    if cells.dtype != pl.String:
        return cells
    texts = cells.str.strip_chars()
    if column.dtype == "string":
        blank = texts == ""
        return cells.set(blank, None) if blank.any() else cells
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


def _rejected(records: Records, faults: pl.DataFrame, fields: int) -> pl.DataFrame:
    """The faults of cells and the malformed rows, in order of line."""
    rows = faults["row"].to_numpy()
    takes = pl.lit(pl.Series(records.spans[rows]))
    reason = pl.concat_str(pl.when(pl.col("value") != "").then(pl.col("value") + " ").otherwise(pl.lit("")), "problem")
    reason = pl.when(takes > 1).then(pl.format("{}; the row takes {} lines", reason, takes)).otherwise(reason)
    line = pl.Series("line", records.lines[rows], pl.Int64)
    cells = faults.select(line, "column", "value", reason.alias("reason"), "problem")
    malformed = []
    for row in records.malformed_rows:
        problem = f"row has {counted(row.fields, 'field')}, the header {fields}"
        spanning = f"; it takes {counted(row.lines, 'line')}" if row.lines > 1 else ""
        malformed.append((row.line, "", row.text, f"the {problem}{spanning}", problem))
    rejected = pl.concat([cells, pl.DataFrame(malformed, schema=REJECTIONS, orient="row")])
    return rejected.sort("line", maintain_order=True)
