"""Events: their columns (in memory, in the Iceberg table and its files), the changes of them that a group accepts, and
how they are read from Parquet files, written, and read back.

A table that SageMaker has made knows three types only: it holds times as text and truth values as 0 and 1. Its files
are converted when they are read and written (`step_scripts.table.column_types.columns_as`). A data file is of one day
and sorted by record id. Writing can be repeated: files of an earlier attempt have other names, and what is not
committed is deleted in the end.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl
import pyarrow as pa
from pyiceberg.schema import Schema
from pyiceberg.types import StringType

from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import TIMESTAMP, columns_as, polars_schema
from step_scripts.table.hashes import content_hashes, event_hashes, hash_sums, text_hashes
from step_scripts.table.spec import TableSpec

FLAGS: dict[str, Any] = {"write_time": TIMESTAMP, "api_invocation_time": TIMESTAMP, "is_deleted": pl.Boolean()}
_RESERVED_COLUMNS = ("record_id", "event_time", *FLAGS)
_MEANINGS = {
    "event_time": "when the row became true",
    "write_time": "when it was stored",
    "api_invocation_time": "when it was stored",
    "is_deleted": "whether the record does not exist from its event time on",
}
BY_RECORD = (
    pl.col("record_id").cast(pl.Binary).bin.slice(0, 8).bin.reinterpret(dtype=pl.UInt64, endianness="big"),
    pl.col("record_id"),
)
"""Sorts events by record id: a comparison of texts only where the first eight digits are equal takes a sixth."""
_ROW_GROUP_ROWS = 1 << 15  # a look-up decodes one row group a file
LARGEST_FILE = 1 << 20  # rows of a file that several others are brought together in
_SAGEMAKERS_TYPES: dict[Any, Any] = {TIMESTAMP: pl.String(), pl.Boolean(): pl.Int64()}


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


def table_columns(table: TableSpec, present: Schema | None = None) -> pa.Schema:
    """Columns of a local group's Iceberg table; or those that a table of columns `present` lacks, in its types."""
    types = event_types(table)
    if present is not None:
        is_sagemakers = isinstance(present.find_field("event_time").field_type, StringType)
        own_types = _SAGEMAKERS_TYPES if is_sagemakers else {}
        types = {name: own_types.get(kind, kind) for name, kind in types.items() if name not in present.column_names}
    meanings = {column.name: column.description for column in table.columns} | _MEANINGS
    fields = pl.DataFrame(schema=types).to_arrow().schema
    return pa.schema([field.with_metadata({"doc": meanings.get(field.name) or ""}) for field in fields])


def validate_schema_change(group: str, current: TableSpec | None, table: TableSpec) -> bool:
    """Whether `table` has columns that `current` lacks. They are accepted if they may be empty.

    Raises `StepError`, naming the columns, if the store itself uses the name of one, or if rows of `table` and stored
    rows of `current`, if there are any, are not the same kind of record: other types, keys or event time, missing
    columns, new columns that may not be empty.
    """
    reserved = [name for name in table.column_names if name in _RESERVED_COLUMNS]
    if reserved:
        raise StepError(
            f"table {table.name!r} cannot be stored in feature group {group}: the store uses the names {reserved} "
            "itself. Rename these columns"
        )
    if current is None:
        return False
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


@dataclass(frozen=True)
class Source:
    """Some Parquet files, one after the other: of the dataset; or of the group, then `stored` has their columns' types.

    `index`: its number among all sources of an ingestion.
    """

    index: int
    uris: tuple[str, ...]
    rows: int
    stored: Mapping[str, Any] | None = None

    @property
    def remedy(self) -> str:
        """What to do about a file that is not as it should be."""
        return "Make its asset again" if self.stored is None else "Restore it from a backup, or delete the group"


def read_source(source: Source, columns: Sequence[str], table: TableSpec) -> pl.DataFrame:
    """Columns of `source`. Columns that stored files lack are null.

    Raises `StepError` if a file cannot be read, lacks a column, or has one of another type.
    """
    types = source.stored if source.stored is not None else row_types(table)
    wanted = event_types(table)
    try:
        events = pl.scan_parquet(
            [_file(uri) for uri in source.uris],  # pyright: ignore[reportArgumentType]
            schema=types,  # pyright: ignore[reportArgumentType]
            missing_columns="raise" if source.stored is None else "insert",
            extra_columns="ignore",
            hive_partitioning=False,
            glob=False,
        )
        result = events.select(columns_as(types, {name: wanted[name] for name in columns})).collect()
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise StepError(_explained(source, types, error)) from error
    if result.height != source.rows:
        raise StepError(f"{source.uris[0]} and those after it have other rows than they should. {source.remedy}")
    return result


def _file(uri: str) -> Any:
    return io.BytesIO(storage.read_bytes(uri)) if storage.is_remote(uri) else storage.local_path(uri)


def _explained(source: Source, types: Mapping[str, Any], error: Exception) -> str:
    """Which file is to blame, and what is wrong with it."""
    for uri in source.uris:
        try:
            schema = pl.read_parquet_schema(_file(uri))
        except (FileNotFoundError, pl.exceptions.PolarsError) as reason:
            return f"{uri} cannot be read ({reason}). {source.remedy}"
        if source.stored is None and (missing := [name for name in types if name not in schema]):
            return f"{uri} lacks the columns {missing}; it has {list(schema)}. {source.remedy}"
        if wrong := [f"{n} is {schema[n]}, not {types[n]}" for n in types if n in schema and schema[n] != types[n]]:
            return f"{uri}: column {'; '.join(wrong)}. {source.remedy}"
    return f"{source.uris[0]} cannot be read ({error}). {source.remedy}"


@dataclass(frozen=True)
class WriteTarget:
    """Where the files of one attempt to write go, and what they are like.

    `token`: with what their names begin, and no others. `schema`: their columns, with the field ids of the Iceberg
    table. `partition`: the name before `=` in the names of their folders. `write_time`: that of all events.
    """

    data_uri: str
    table: TableSpec
    token: str
    schema: pa.Schema
    partition: str
    write_time: datetime


def tombstones(record_ids: pl.Series, time: pl.Series, table: TableSpec) -> pl.DataFrame:
    """Deletions of records: nothing but id and event time. Columns as those of events, without the times of writing."""
    ids = pl.DataFrame([record_ids.alias("record_id"), time.alias("event_time")])
    return ids.select(columns_as(ids.schema, row_types(table))).with_columns(is_deleted=True)


def write_events(events: pl.DataFrame, target: WriteTarget) -> str:
    """Write one data file, for good, of events of one day in their order; its path relative to `target.data_uri`."""
    stamp = pl.lit(target.write_time, TIMESTAMP)
    if "write_time" not in events.columns:
        events = events.with_columns(stamp.alias("write_time"), stamp.alias("api_invocation_time"))
    content = io.BytesIO()
    events.select(columns_as(events.schema, file_types(target.schema))).write_parquet(
        content, compression="zstd", compression_level=1, row_group_size=_ROW_GROUP_ROWS, arrow_schema=target.schema
    )
    name = f"{target.token}-{hashlib.sha256(content.getbuffer()).hexdigest()}.parquet"
    path = f"{target.partition}={events['event_time'][0]:%Y-%m-%d}/{name}"
    storage.write_bytes(storage.join(target.data_uri, path), content.getvalue())
    return path


def read_back(paths: Sequence[str], target: WriteTarget) -> tuple[list[tuple[str, int]], tuple[int, int]]:
    """Read written files again, from their bytes: path and rows of each, and the digest of all their events.

    A file that is not there, or cannot be decoded, is left out.
    """
    found, frames = [], []
    for path in paths:
        try:
            stored = pl.read_parquet(io.BytesIO(storage.read_bytes(storage.join(target.data_uri, path))))
        except (FileNotFoundError, pl.exceptions.ComputeError):
            continue
        frames.append(stored.select(columns_as(stored.schema, event_types(target.table))))
        found.append((path, stored.height))
    return found, events_digest(pl.concat(frames), target.table) if frames else (0, 0)


def events_digest(events: pl.DataFrame, table: TableSpec) -> tuple[int, int]:
    """The sums that stand for events, deletions included; they do not depend on the events' order."""
    time, deleted = events["event_time"].to_physical().to_numpy(), events["is_deleted"].to_numpy()
    content = content_hashes(events, content_columns(table))
    return hash_sums(event_hashes(text_hashes(events["record_id"]), time, content, deleted))


def write_anew(files: Mapping[str, int], target: WriteTarget, group: str) -> list[str]:
    """Write the events of stored files of one day (rows by path) anew, sorted by record; the paths of the new files."""
    uris = tuple(storage.join(target.data_uri, path) for path in files)
    source = Source(0, uris, sum(files.values()), file_types(target.schema))
    events = read_source(source, list(event_types(target.table)), target.table)
    ordered = events.sort(*BY_RECORD, "event_time", "write_time")
    paths = [write_events(part, target) for part in ordered.iter_slices(LARGEST_FILE)]
    verify_events(paths, events, target, group)
    return paths


def verify_events(paths: Sequence[str], events: pl.DataFrame, target: WriteTarget, group: str) -> None:
    """Raise `StepError` unless the written files hold exactly these events."""
    read, sums = read_back(paths, target)
    if sum(rows for _, rows in read) != events.height or sums != events_digest(events, target.table):
        raise StepError(
            f"{counted(events.height, 'event')} of feature group {group} could not be read back after they were "
            "written; nothing was changed. Check the storage, then try again"
        )
