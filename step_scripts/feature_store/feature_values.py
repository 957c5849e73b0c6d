"""How values become the text of SageMaker's features, and text values again.

SageMaker has three types. Integers and truth values are `Integral`, floating-point numbers `Fractional`, texts and
times `String` (ISO 8601, microseconds). So is the event time, by whose date SageMaker partitions Iceberg tables; the
online store takes no more of it than milliseconds. What is null, or not a number, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import polars as pl

from step_scripts.table.spec import DType, TableSpec

FeatureType = Literal["Integral", "Fractional", "String"]

FEATURE_TYPES: dict[DType, FeatureType] = {
    "int64": "Integral",
    "bool": "Integral",
    "float64": "Fractional",
    "string": "String",
    "datetime": "String",
}
RECORD_ID, EVENT_TIME = "record_id", "event_time"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = 1_000  # microseconds


def feature_types(table: TableSpec) -> dict[str, FeatureType]:
    """Type of each feature, in order: record id, event time, the table's columns."""
    types: dict[str, FeatureType] = {RECORD_ID: "String", EVENT_TIME: "String"}
    types.update((column.name, FEATURE_TYPES[column.dtype]) for column in table.columns)
    return types


def online_time(microseconds: int) -> int:
    """An event time as the online store can hold it: the millisecond that it is in, in microseconds since 1970."""
    return microseconds // _MILLISECOND * _MILLISECOND


def encoded_time(microseconds: int) -> str:
    """`yyyy-MM-ddTHH:mm:ss.SSSZ` of an event time in microseconds since 1970, without what is below a millisecond."""
    moment = _EPOCH + timedelta(microseconds=online_time(microseconds))
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def decoded_time(text: str) -> int:
    """Microseconds since 1970."""
    return (datetime.fromisoformat(text) - _EPOCH) // timedelta(microseconds=1)


def encoded_records(events: pl.DataFrame, table: TableSpec) -> list[dict[str, str]]:
    """Features of each row as text."""
    columns: dict[str, list[str | None]] = {
        RECORD_ID: events[RECORD_ID].to_list(),
        EVENT_TIME: [encoded_time(t) for t in events[EVENT_TIME].to_physical().to_list()],
    }
    for column in table.columns:
        columns[column.name] = [_encoded(value, column.dtype) for value in events[column.name].to_list()]
    names = list(columns)
    return [
        {name: text for name, text in zip(names, row, strict=True) if text is not None}
        for row in zip(*columns.values(), strict=True)
    ]


def decoded_record(features: Mapping[str, str], table: TableSpec) -> dict[str, Any]:
    """Values of a record's features: record_id, event_time (UTC), the table's columns."""
    moment = datetime.fromisoformat(features[EVENT_TIME])
    record: dict[str, Any] = {RECORD_ID: features[RECORD_ID], EVENT_TIME: moment}
    return record | {c.name: _decoded(features.get(c.name), c.dtype) for c in table.columns}


def _encoded(value: Any, dtype: DType) -> str | None:
    if value is None or value != value:
        return None
    if dtype == "datetime":
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if dtype == "bool":
        return str(int(value))
    return repr(value) if dtype == "float64" else str(value)


def _decoded(text: str | None, dtype: DType) -> Any:
    if text is None:
        return None
    if dtype == "datetime":
        return datetime.fromisoformat(text)
    if dtype == "bool":
        return bool(int(text))
    return {"int64": int, "float64": float, "string": str}[dtype](text)
