"""What runs in parallel in an ingestion: hash a file, compare a bucket of records, write files, read them back.

Records are divided into buckets by the hash of their id. Hashes go through scratch files, ordered by bucket (see
`step_scripts.feature_store.scratch_arrays`), so that memory depends on the size of a piece and not of the group. Every
function can be repeated: it overwrites what an earlier attempt has left.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa

from step_scripts.feature_store.event_sources import Source, check_complete, read_source
from step_scripts.feature_store.event_timeline import Changes, Events, changes, joined
from step_scripts.feature_store.group import StoredFile
from step_scripts.feature_store.ingestion_plan import (
    ATTEMPT_CHARACTERS,
    HASH_LANES,
    SELECTION_LANES,
    Hashed,
    Selection,
    WriteItem,
    WriteTarget,
)
from step_scripts.feature_store.scratch_arrays import load_lanes, save_lanes
from step_scripts.feature_store.stored_types import decoded, encoded, event_types, file_types
from step_scripts.runner import storage
from step_scripts.table.column_types import TIMESTAMP, polars_schema
from step_scripts.table.hashes import Hash128, content_hashes, event_hashes, hash_sums, text_hashes, text_prefixes
from step_scripts.table.spec import TableSpec

DAY = 24 * 3_600_000_000  # microseconds
SHOWN = 20  # ids in a message
ROW_GROUP_ROWS = 1 << 15  # a look-up decodes one row group a file
_NAME_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_datetime(microseconds: int) -> datetime:
    """Microseconds since 1970 as a time."""
    return _EPOCH + timedelta(microseconds=microseconds)


def to_microseconds(time: datetime) -> int:
    """A time as microseconds since 1970, exactly."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def content_columns(table: TableSpec) -> list[str]:
    """Columns that make up a record's content: all but the event time."""
    return [name for name in table.column_names if name != table.event_time_column]


def hash_source(source: Source, table: TableSpec, buckets: int, folder: str, wanted: Sequence[Hashed] | None) -> Hashed:
    """Hash the events of `source`; with `wanted`, only those of records that are in these sources.

    Raises `StepError` if it lacks a column, has one of another type, or has empty record ids or event times.
    """
    ids = read_source(source, ["record_id", "event_time"], table)
    check_complete(ids, source)
    record = text_hashes(ids["record_id"])
    rows = np.arange(source.rows, dtype=np.uint64)
    if wanted is not None:
        known = pl.concat(
            [pl.Series(np.ascontiguousarray(load_lanes(w.path, HASH_LANES, np.uint64)[0])) for w in wanted]
        )
        chosen = pl.Series(record[0]).is_in(known.implode()).to_numpy()
        record, rows, ids = (record[0][chosen], record[1][chosen]), rows[chosen], ids.filter(chosen)
    flags = [] if source.stored is None else ["is_deleted", "write_time"]
    frame = read_source(source, [*content_columns(table), *flags], table, rows)
    content = content_hashes(frame, content_columns(table))
    time = ids["event_time"].to_physical().to_numpy()
    values = [*record, time.view(np.uint64), *content, rows]
    if source.stored is not None:  # later than that of every earlier commit
        written = frame["write_time"].to_physical().to_numpy()
        values += [written.view(np.uint64), frame["is_deleted"].to_numpy()]
    order, starts = by_bucket(record[0], buckets)
    lanes = np.zeros((HASH_LANES, len(rows)), np.uint64)
    for lane, column in enumerate(values):
        lanes[lane] = column if order is None else column[order]
    path = storage.join(folder, f"hashes-{source.index}.npy")
    save_lanes(path, lanes)
    return Hashed(path, starts, int(time.min()) if len(time) else None, int(time.max()) if len(time) else None)


def by_bucket(records: np.ndarray, buckets: int) -> tuple[np.ndarray | None, tuple[int, ...]]:
    """Positions that order records by bucket (None: as they are), and the start of each bucket and the end of the last.

    `records` are first halves of hashes of record ids, `buckets` is a power of two.
    """
    if buckets == 1:
        return None, (0, len(records))
    bucket = (records >> np.uint64(64 - buckets.bit_length() + 1)).astype(np.uint16)
    starts = (0, *np.cumsum(np.bincount(bucket, minlength=buckets)).tolist())
    return np.argsort(bucket, kind="stable"), starts


def compare_bucket(
    bucket: int, incoming: Sequence[tuple[int, Hashed]], stored: Sequence[tuple[int, Hashed]], folder: str,
    mirror_time: int | None,
) -> tuple[Changes, list[Selection], list[tuple[int, int, int]], tuple[int, int], int]:  # fmt: skip
    """Compare the events of one bucket, given sources' indices and hashes.

    Returns what changes (without the events), where the rows to store are listed, how many they are of each (source,
    day), their digest, and how many are their records' latest events. Raises nothing for conflicts: they are returned.
    """
    result = changes(_bucket_events(bucket, incoming), _bucket_events(bucket, stored), mirror_time)
    news = joined(result.stored) if result.stored else _bucket_events(bucket, ())
    order = np.argsort(news.source, kind="stable")
    source, row, time = news.source[order], news.row[order], news.time[order]
    latest = np.concatenate([*result.latest, np.empty(0, bool)])[order]
    path = storage.join(folder, f"selected-{bucket}.npy")
    save_lanes(path, np.stack([row.astype(np.int64), time, latest.astype(np.int64)]))
    numbers, counts = np.unique(source, return_counts=True)
    stops = np.cumsum(counts)
    selections = [
        Selection(int(n), path, int(stop - count), int(stop))
        for n, stop, count in zip(numbers, stops, counts, strict=True)
    ]
    histogram = [
        (int(s.source), int(day), int(count))
        for s in selections
        for day, count in zip(*np.unique(time[s.start : s.stop] // DAY, return_counts=True), strict=True)
    ]
    light = replace(
        result, stored=[], latest=[], conflicts=[c.take(np.arange(min(len(c), SHOWN))) for c in result.conflicts]
    )
    return light, selections, histogram, news.sums(with_deleted=True), int(latest.sum())


def write_files(item: WriteItem, target: WriteTarget) -> list[str]:
    """Write the files of `item`, one a day; their paths relative to `target.data`."""
    frames = [selected_rows(source, selections, item, target.table) for source, selections in item.sources]
    frame = pl.concat(frames).drop("is_latest").rechunk()  # reordering many chunks takes longer
    days = frame["event_time"].to_physical().to_numpy() // DAY
    order = _storage_order(frame["record_id"], days)
    frame, days = frame[order], days[order]
    bounds = [0, *(np.flatnonzero(days[1:] != days[:-1]) + 1).tolist(), frame.height]
    return [
        write_events(
            frame[start:stop].with_columns(
                pl.lit(target.write_time, TIMESTAMP).alias("write_time"),
                pl.lit(target.write_time, TIMESTAMP).alias("api_invocation_time"),
            ),
            target,
        )
        for start, stop in pairwise(bounds)
    ]


def write_events(events: pl.DataFrame, target: WriteTarget) -> str:
    """Write one stored file, for good, of events of one day in their order; its path relative to `target.data`."""
    content = io.BytesIO()
    encoded(events, target.schema).write_parquet(
        content,
        compression="zstd",
        compression_level=1,
        row_group_size=ROW_GROUP_ROWS,
        arrow_schema=target.schema,  # with the field ids of the table
    )
    day = to_datetime(int(events["event_time"].to_physical()[0])).date().isoformat()
    name = f"{target.ingestion}-{hashlib.sha256(content.getbuffer()).hexdigest()}.parquet"
    path = f"{target.partition}={day}/{name}"
    storage.write_bytes(storage.join(target.data, path), content.getvalue())
    return path


def attempt_token() -> str:
    """Characters that tell the files of one ingestion, or deletion, from those of all others."""
    return "".join(secrets.choice(_NAME_ALPHABET) for _ in range(ATTEMPT_CHARACTERS))


def read_back(
    data: str, paths: Sequence[str], table: TableSpec, schema: pa.Schema
) -> tuple[list[StoredFile], tuple[int, int]]:
    """Read stored files again, from their bytes: their descriptions, and the digest of all their events.

    A file that is not there, or cannot be decoded, is left out.
    """
    files, frames = [], []
    types, wanted = file_types(schema), event_types(table)
    for path in paths:
        try:
            content = storage.read_bytes(storage.join(data, path))
            stored = pl.read_parquet(io.BytesIO(content))
        except (FileNotFoundError, pl.exceptions.ComputeError):
            continue
        frame = stored.select(decoded(name, types, wanted) for name in wanted)
        frames.append(frame)
        time = frame["event_time"].to_physical().to_numpy()
        files.append(
            StoredFile(
                path=path,
                rows=frame.height,
                bytes=len(content),
                first_event_time=to_datetime(int(time.min())),
                last_event_time=to_datetime(int(time.max())),
            )
        )
    if not frames:
        return [], (0, 0)
    return files, events_digest(pl.concat(frames), table)


def events_digest(events: pl.DataFrame, table: TableSpec) -> tuple[int, int]:
    """The sums that stand for events, deletions included; they do not depend on the events' order."""
    time, deleted = events["event_time"].to_physical().to_numpy(), events["is_deleted"].to_numpy()
    content = content_hashes(events, content_columns(table))
    return hash_sums(event_hashes(text_hashes(events["record_id"]), time, content, deleted))


def _bucket_events(bucket: int, sources: Sequence[tuple[int, Hashed]]) -> Events:
    parts = []
    for index, hashed in sources:
        lanes = load_lanes(hashed.path, HASH_LANES, np.uint64, hashed.starts[bucket], hashed.starts[bucket + 1])
        if not lanes.shape[1]:
            continue
        lanes = np.ascontiguousarray(lanes)
        record: Hash128 = (lanes[0], lanes[1])
        where = np.full(lanes.shape[1], index)
        deleted = lanes[7].astype(bool)
        parts.append(
            Events(
                record, lanes[2].view(np.int64), (lanes[3], lanes[4]), where, lanes[5], lanes[6].view(np.int64), deleted
            )
        )
    if parts:
        return joined(parts)
    none, whole = np.empty(0, np.uint64), np.empty(0, np.int64)
    return Events((none, none), whole, (none, none), whole, none, whole, np.empty(0, bool))


def selected_rows(source: Source, selections: Sequence[Selection], item: WriteItem, table: TableSpec) -> pl.DataFrame:
    """The events to store from one source: its rows (all of them without `selections`), or tombstones of its records.

    Columns: record_id, event_time, those of the table, is_deleted, is_latest.
    """
    columns = ["record_id", "event_time", *table.column_names]
    if not selections:
        frame = read_source(source, columns, table)
        day = frame["event_time"].to_physical() // DAY
        inside = day.is_between(item.first_day, item.last_day)
        if not inside.all():
            frame = frame.filter(inside)
        return frame.with_columns(pl.lit(False).alias("is_deleted"), pl.lit(True).alias("is_latest"))
    parts = [load_lanes(s.path, SELECTION_LANES, np.int64, s.start, s.stop) for s in selections]
    row, time, latest = np.concatenate(parts, axis=1)
    days = time // DAY
    inside = (days >= item.first_day) & (days <= item.last_day)
    if not inside.all():
        row, time, latest = row[inside], time[inside], latest[inside]
    if source.stored is not None:
        ids = read_source(source, ["record_id"], table)[row]
        return tombstones(ids["record_id"], time, table).with_columns(pl.lit(True).alias("is_latest"))
    frame = read_source(source, columns, table)
    if len(row) < source.rows:
        frame = frame[row]
    else:
        order = np.argsort(row)
        time, latest = time[order], latest[order]
    return frame.with_columns(
        pl.Series("event_time", time).cast(TIMESTAMP),
        pl.lit(False).alias("is_deleted"),
        pl.Series("is_latest", latest.astype(bool)),
    )  # the comparison may have moved an event behind what is stored


def tombstones(record_ids: pl.Series, time: np.ndarray, table: TableSpec) -> pl.DataFrame:
    """Deletions of records at times given in microseconds: nothing but id and time."""
    frame = pl.DataFrame([record_ids.alias("record_id"), pl.Series("event_time", time).cast(TIMESTAMP)])
    empty = (pl.lit(None, dtype).alias(name) for name, dtype in polars_schema(table).items())
    return frame.with_columns(*empty, pl.lit(True).alias("is_deleted"))


def _storage_order(record_ids: pl.Series, days: np.ndarray) -> np.ndarray:
    """Positions that order rows by day, then by record id: by its first 8 bytes, if these tell most ids apart."""
    prefixes = text_prefixes(record_ids)
    order = pl.Series(prefixes).arg_sort().to_numpy()  # numpy takes twice as long
    ordered = prefixes[order]
    if np.count_nonzero(ordered[1:] == ordered[:-1]) > len(prefixes) // 10:
        both = pl.DataFrame({"day": days, "id": record_ids})
        return both.select(pl.arg_sort_by(["day", "id"])).to_series().to_numpy()
    if len(days) and (days != days[0]).any():
        order = order[np.argsort(days[order], kind="stable")]
    return order
