"""The columns of events: in memory, in the Iceberg table and its files, and the changes of them that a group accepts.

A table that SageMaker has made knows three types only: it holds times as text and truth values as 0 and 1. Its files
are converted when they are read and written (`step_scripts.table.column_types.columns_as`).
"""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa
from pyiceberg.schema import Schema
from pyiceberg.types import (
    BooleanType,
    DoubleType,
    IcebergType,
    LongType,
    NestedField,
    PrimitiveType,
    StringType,
    TimestamptzType,
)

from step_scripts.runner.contract import StepError
from step_scripts.table.column_types import TIMESTAMP, polars_schema
from step_scripts.table.spec import DType, TableSpec

FLAGS: dict[str, Any] = {"write_time": TIMESTAMP, "api_invocation_time": TIMESTAMP, "is_deleted": pl.Boolean()}
_RESERVED_COLUMNS = ("record_id", "event_time", *FLAGS)
_ICEBERG_TYPES: dict[DType, PrimitiveType] = {
    "int64": LongType(),
    "float64": DoubleType(),
    "bool": BooleanType(),
    "string": StringType(),
    "datetime": TimestamptzType(),
}


def row_types(table: TableSpec) -> dict[str, Any]:
    """Columns of a dataset's rows, in order, with their Polars types."""
    return {"record_id": pl.String(), "event_time": TIMESTAMP} | polars_schema(table)


def event_types(table: TableSpec) -> dict[str, Any]:
    """Columns of events, in order, with the Polars types that they have in memory."""
    return row_types(table) | FLAGS


def file_types(schema: pa.Schema) -> dict[str, Any]:
    """Polars types that the columns have in files of this schema."""
    return dict(pl.DataFrame(schema.empty_table()).schema)


def content_columns(table: TableSpec) -> list[str]:
    """Columns that make up a record's content: all but the event time."""
    return [name for name in table.column_names if name != table.event_time_column]


def iceberg_schema(table: TableSpec) -> Schema:
    """Columns of a local group's Iceberg table."""
    columns: list[tuple[str, PrimitiveType, str]] = [
        ("record_id", StringType(), ""),
        ("event_time", TimestamptzType(), "when the row became true"),
        *((column.name, _ICEBERG_TYPES[column.dtype], column.description) for column in table.columns),
        ("write_time", TimestamptzType(), "when it was stored"),
        ("api_invocation_time", TimestamptzType(), "when it was stored"),
        ("is_deleted", BooleanType(), "whether the record does not exist from its event time on"),
    ]
    fields = enumerate(columns, 1)
    return Schema(*(NestedField(n, name, kind, required=False, doc=doc or None) for n, (name, kind, doc) in fields))


def missing_columns(schema: Schema, table: TableSpec) -> Schema:
    """Columns of `table` that an Iceberg table lacks, in the types that the Iceberg table has for such columns."""
    is_sagemakers = isinstance(schema.find_field("event_time").field_type, StringType)
    present = set(schema.column_names)

    def own_type(kind: IcebergType) -> IcebergType:
        if is_sagemakers and isinstance(kind, TimestamptzType):
            return StringType()
        return LongType() if is_sagemakers and isinstance(kind, BooleanType) else kind

    fields = [field for field in iceberg_schema(table).fields if field.name not in present]
    return Schema(*(field.model_copy(update={"field_type": own_type(field.field_type)}) for field in fields))


def validate_columns(group: str, table: TableSpec) -> None:
    """Raise `StepError` if a column has a name that the store itself uses."""
    reserved = [name for name in table.column_names if name in _RESERVED_COLUMNS]
    if reserved:
        raise StepError(
            f"table {table.name!r} cannot be stored in feature group {group}: the store uses the names {reserved} "
            "itself. Rename these columns"
        )


def validate_schema_change(group: str, current: TableSpec, table: TableSpec) -> bool:
    """Whether `table` has columns that `current` lacks. They are accepted if they may be empty.

    Raises `StepError`, naming the columns, if rows of `table` and stored rows of `current` are not the same kind of
    record: other types, keys or event time, missing columns, new columns that may not be empty.
    """
    old = {column.name: column for column in current.columns}
    new = {column.name: column for column in table.columns}
    problems = [f"{name} is missing" for name in old if name not in new]
    for name, column in new.items():
        if name not in old:
            if not column.nullable:
                problems.append(f"{name} is new and must not be empty, but stored rows have no value for it")
            continue
        if column.dtype != old[name].dtype:
            problems.append(f"{name} is {column.dtype}, stored as {old[name].dtype}")
        if old[name].nullable and not column.nullable:
            problems.append(f"{name} must not be empty any more, but stored rows may have no value for it")
    if table.key_columns != current.key_columns:
        problems.append(f"key columns are {list(table.key_columns)}, were {list(current.key_columns)}")
    if table.event_time_column != current.event_time_column:
        problems.append(f"the event time column is {table.event_time_column}, was {current.event_time_column}")
    if problems:
        raise StepError(
            f"feature group {group} exists with another schema: {'; '.join(problems)}. Use another group name, "
            "delete the group, or add only columns that may be empty"
        )
    return any(name not in old for name in new)
