"""Polars types of a table's columns; without pandera, which takes longer to import than all else a worker needs."""

from __future__ import annotations

import polars as pl

from step_scripts.table.spec import DType, TableSpec

POLARS_TYPES: dict[DType, pl.DataType] = {
    "int64": pl.Int64(),
    "float64": pl.Float64(),
    "bool": pl.Boolean(),
    "string": pl.String(),
    "datetime": pl.Datetime("us", "UTC"),
}


def polars_schema(table: TableSpec) -> dict[str, pl.DataType]:
    """Polars types of the columns, in the schema's order."""
    return {column.name: POLARS_TYPES[column.dtype] for column in table.columns}
