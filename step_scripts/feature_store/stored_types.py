"""How a group's columns stand in its files: as they are, or, where SageMaker has made the table, in its three types.

A file has the columns and the field ids of the Iceberg table. SageMaker's tables hold times as text and truth values as
0 and 1 (`step_scripts.table.column_types.converted`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa

from step_scripts.table.column_types import TIMESTAMP, columns_as, converted, polars_schema
from step_scripts.table.spec import TableSpec

FLAGS: dict[str, Any] = {"write_time": TIMESTAMP, "api_invocation_time": TIMESTAMP, "is_deleted": pl.Boolean()}


def event_types(table: TableSpec) -> dict[str, Any]:
    """Columns of events, in order, with the types that they have outside of the files."""
    return {"record_id": pl.String(), "event_time": TIMESTAMP} | polars_schema(table) | FLAGS


def file_types(schema: pa.Schema) -> dict[str, Any]:
    """Types that the columns have in the files."""
    return dict(pl.DataFrame(schema.empty_table()).schema)


def encoded(events: pl.DataFrame, schema: pa.Schema) -> pl.DataFrame:
    """Events as a file of this schema has them. Columns that they lack are null."""
    return events.select(columns_as(events.schema, file_types(schema)))


def decoded(name: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> pl.Expr:
    """A column of files, in the type that it has outside of them."""
    return converted(pl.col(name), stored[name], wanted[name]).alias(name)
