"""A table's columns in Polars: their types, from one type to another, and read from CSV."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from step_scripts.table.spec import DType, TableSpec

TIMESTAMP = pl.Datetime("us", "UTC")
POLARS_TYPES: dict[DType, pl.DataType] = {
    "int64": pl.Int64(),
    "float64": pl.Float64(),
    "bool": pl.Boolean(),
    "string": pl.String(),
    "datetime": TIMESTAMP,
}
# Times as text: ISO 8601 in UTC with microseconds, so that the order of texts is that of times.
_TEXT_TIME = "%Y-%m-%dT%H:%M:%S%.6fZ"


def polars_schema(table: TableSpec) -> dict[str, pl.DataType]:
    """Polars types of the columns, in the schema's order."""
    return {column.name: POLARS_TYPES[column.dtype] for column in table.columns}


def columns_as(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[pl.Expr]:
    """The columns `wanted`, by name and type, of a frame whose columns are `found`; null where it lacks one."""
    return [
        (converted(pl.col(name), found[name], kind) if name in found else pl.lit(None, kind)).alias(name)
        for name, kind in wanted.items()
    ]


def converted(column: pl.Expr, found: Any, wanted: Any) -> pl.Expr:
    """A column of type `found` in type `wanted`. Also between times and texts, and between truth values and 0 and 1."""
    if found == wanted:
        return column
    if found == pl.String() and isinstance(wanted, pl.Datetime):
        return column.str.to_datetime(_TEXT_TIME, time_unit="us", time_zone="UTC")
    if isinstance(found, pl.Datetime) and wanted == pl.String():
        return column.dt.strftime(_TEXT_TIME)
    if isinstance(found, pl.Datetime) and isinstance(wanted, pl.Datetime):
        return column.dt.replace_time_zone(wanted.time_zone).dt.cast_time_unit(wanted.time_unit or "us")
    return column.cast(wanted)


def read_csv(source: Any, **options: Any) -> pl.DataFrame:
    """`polars.read_csv`. Raises `polars.exceptions.ComputeError` also where Polars panics.

    A panic, as on a last field that is one quote, is no `Exception`, and would end whatever the reader is part of.
    """
    try:
        return pl.read_csv(source, **options)
    except pl.exceptions.PanicException as panic:
        raise pl.exceptions.ComputeError(f"Polars cannot read it: {panic}") from panic
