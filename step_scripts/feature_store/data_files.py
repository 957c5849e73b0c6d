"""Data files of events: written, each of one day and sorted by record id, and read back.

What runs in parallel can be repeated: files of an earlier attempt have other names, and what is not committed is
deleted in the end.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import polars as pl
import pyarrow as pa

from step_scripts.feature_store.comparison import DAY, selected_rows
from step_scripts.feature_store.events import Source, content_columns, event_types, file_types, read_source, row_types
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import TIMESTAMP, columns_as
from step_scripts.table.hashes import content_hashes, event_hashes, hash_sums, text_hashes
from step_scripts.table.spec import TableSpec

_ROW_GROUP_ROWS = 1 << 15  # a look-up decodes one row group a file
LARGEST_FILE = 1 << 20  # rows of a file that several others are brought together in
_NAME_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_TOKEN_CHARACTERS = 6


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


@dataclass(frozen=True)
class WriteItem:
    """`rows` events to write: those that the comparison in folder `selected` has chosen of each source and its days.

    Days are counted from 1970, first and last.
    """

    sources: tuple[tuple[Source, int, int], ...]
    selected: str
    rows: int


def attempt_token() -> str:
    """Characters that tell the files of one attempt to write from those of all others."""
    return "".join(secrets.choice(_NAME_ALPHABET) for _ in range(_TOKEN_CHARACTERS))


def item_events(item: WriteItem, table: TableSpec) -> pl.DataFrame:
    """The events of `item`: record_id, event_time, the table's columns, is_deleted, is_latest."""
    frames = []
    for source, first_day, last_day in item.sources:
        rows = selected_rows(item.selected, source).filter((pl.col("time") // DAY).is_between(first_day, last_day))
        time = rows["time"].cast(TIMESTAMP).alias("event_time")  # may have been moved behind what is stored
        if source.stored is not None:
            ids = read_source(source, ["record_id"], table)[rows["row"]]
            events = tombstones(ids["record_id"], time, table)
        else:
            events = read_source(source, list(row_types(table)), table)[rows["row"]]
            events = events.with_columns(time, is_deleted=False)
        frames.append(events.with_columns(rows["is_latest"]))
    return pl.concat(frames).rechunk()


def tombstones(record_ids: pl.Series, time: pl.Series, table: TableSpec) -> pl.DataFrame:
    """Deletions of records: nothing but id and event time. Columns as those of events, without the times of writing."""
    ids = pl.DataFrame([record_ids.alias("record_id"), time.alias("event_time")])
    return ids.select(columns_as(ids.schema, row_types(table))).with_columns(is_deleted=True)


def write_files(item: WriteItem, target: WriteTarget) -> list[str]:
    """Write the files of `item`, one a day; their paths relative to `target.data_uri`."""
    events = item_events(item, target.table).with_columns(pl.col("event_time").dt.date().alias("_day"))
    days = events.sort("record_id").partition_by("_day", maintain_order=False, include_key=False)
    return [write_events(day, target) for day in days]


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


def write_anew(source: Source, target: WriteTarget, group: str) -> list[str]:
    """Write the events of stored files of one day anew, sorted by record; the paths of the new files."""
    events = read_source(source, list(event_types(target.table)), target.table)
    ordered = events.sort("record_id", "event_time", "write_time")
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
