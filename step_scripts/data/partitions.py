"""Where rows of different blocks meet: duplicates of a table, and the events of a record.

Rows stay where they are: what is divided into partitions (`step_scripts.table.hashes`) are ids, positions and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import numpy as np
import polars as pl

from step_scripts.runner import storage
from step_scripts.runner.contract import Reporter
from step_scripts.runner.ray_data import PATH, ParquetBlocks, Progress, each_call
from step_scripts.table.column_types import TIMESTAMP, converted
from step_scripts.table.hashes import (
    Hash128,
    distinct_hashes,
    hashes_of_ids,
    partition_of,
    read_partition,
    split_fraction,
    write_partitions,
)

# In order of precedence: the latest event wins; of equal ones, the one that was written last.
TIMES = ("event_time", "api_invocation_time", "write_time")
_PARTITION_BYTES = 128 << 20  # of CSV: some 2 to 5 million rows
_MOST_PARTITIONS = 1024
_PARTITION_ROWS = 2_000_000
_SALT = "events of a record"
_ID = ["hash_hi", "hash_lo"]


# Rows with equal record ids.


def partition_count(csv_bytes: int) -> int:
    """Number of partitions for files of that size in all."""
    return min(max(1, -(-csv_bytes // _PARTITION_BYTES)), _MOST_PARTITIONS)


def write_ids(uri: str, fragment: int, hashes: Hash128, lines: pl.Series, partitions: int) -> None:
    """Write the hashes of a fragment's record ids, and for each row the line it stands in."""
    ids = pl.DataFrame({"hash_hi": hashes[0], "hash_lo": hashes[1], "line": lines}).with_row_index("row")
    ids = ids.with_columns(pl.lit(fragment, pl.Int32).alias("fragment"))
    write_partitions(ids, partition_of(hashes[0], partitions), partitions, uri)


def find_duplicates(id_uris: Sequence[str], partition: int, uri: str) -> dict[int, int]:
    """Look for equal ids in one partition of all fragments, in order of the rows.

    Returns how many rows of which fragment equal an earlier row. If there are any, the Parquet file `uri` is written:
    fragment, row, line, occurrence (1 for the second of equal rows), first_fragment, first_line.
    """
    ids = pl.concat(read_partition(id_uris, partition))
    ordered = ids["hash_hi"].sort()
    repeated = ordered.filter(ordered == ordered.shift()).unique()
    if repeated.is_empty():
        return {}
    found = (
        ids.filter(pl.col("hash_hi").is_in(repeated.implode()))
        .with_columns(
            pl.int_range(pl.len(), dtype=pl.UInt32).over(_ID).alias("occurrence"),
            pl.col("fragment", "line").first().over(_ID).name.prefix("first_"),
        )
        .filter(pl.col("occurrence") > 0)
        .select("fragment", "row", "line", "occurrence", "first_fragment", "first_line")
    )
    if found.is_empty():
        return {}
    with storage.open_output(uri) as file:
        found.write_parquet(file)
    return dict(found.group_by("fragment").len().iter_rows())


def without_duplicates(
    frame: pl.DataFrame, duplicate_uris: Sequence[str], fragment: int, *, keep: bool
) -> pl.DataFrame:
    """The rows of a fragment that equal no earlier row; or (`keep`) all of them, with ids of their own.

    The second of equal rows gets the suffix `-1`, the third `-2`.
    """
    here = pl.col("fragment") == fragment
    duplicates = pl.concat(_duplicates(uri).filter(here).select("row", "occurrence") for uri in duplicate_uris)
    joined = frame.with_row_index("row").join(duplicates, on="row", how="left", maintain_order="left")
    if keep:
        suffixed = pl.concat_str("record_id", pl.lit("-"), pl.col("occurrence").cast(pl.String))
        joined = joined.with_columns(pl.coalesce(suffixed, "record_id").alias("record_id"))
    else:
        joined = joined.filter(pl.col("occurrence").is_null())
    return joined.drop("row", "occurrence")


def first_duplicates(duplicate_uris: Sequence[str], limit: int) -> pl.DataFrame:
    """The first `limit` rows that equal an earlier row, with the columns of `find_duplicates`."""
    found: list[pl.DataFrame] = []
    for uri in duplicate_uris:
        found = [pl.concat([*found, _duplicates(uri)]).sort("fragment", "row").head(limit)]
    return found[0]


def _duplicates(uri: str) -> pl.DataFrame:
    return pl.read_parquet(storage.read_bytes(uri))


# Events of a record: of each the latest one counts, unless it is a deletion.


class LatestEvents(NamedTuple):
    """Where the positions of the events are that count, and how many there were, by what became of them."""

    uri: str
    counts: dict[str, int]

    def of(self, rows: pl.DataFrame, place: int) -> pl.DataFrame:
        """The rows that count of the block whose first file has that place."""
        kept = np.zeros(rows.height, dtype=bool)
        for found in read_partition(storage.list_files(storage.join(self.uri, "kept")), place):
            kept[found["row"].to_numpy()] = True
        return rows.filter(pl.Series(kept))


def latest_events(blocks: ParquetBlocks, as_of: datetime | None, scratch_uri: str, log: Reporter) -> LatestEvents:
    """Find them among `blocks`, with columns `record_id`, `is_deleted` and those of `TIMES` that there are.

    What is written goes below `scratch_uri`.
    """
    partitions = max(1, -(-blocks.rows // _PARTITION_ROWS))
    progress = Progress(log, "prepare_splits, bringing events of a record together", blocks.rows)
    later = blocks.reports(_scatter, blocks.files, as_of, scratch_uri, partitions, progress=progress)
    calls = [(number, len(blocks.files), scratch_uri) for number in range(partitions)]
    chosen = [counts for _, counts in each_call(_choose, calls)]
    counts = {
        "rows_read": blocks.rows,
        "rows_later": sum(later),
        "rows_superseded": sum(superseded for superseded, _ in chosen),
        "rows_deleted": sum(deleted for _, deleted in chosen),
    }
    return LatestEvents(scratch_uri, counts)


def _scatter(
    rows: pl.DataFrame, files: dict[str, int], as_of: datetime | None, scratch_uri: str, partitions: int
) -> int:
    """Write ids, times and positions of a block's events. Returns how many are later than `as_of`."""
    place = files[rows[PATH][0]]
    times = [name for name in TIMES if name in rows.columns]
    hashes = hashes_of_ids(rows["record_id"])
    number = (split_fraction(hashes, _SALT) * partitions).astype(np.int64)
    hash_hi, hash_lo = distinct_hashes(rows["record_id"], hashes)
    events = rows.select(
        pl.Series("hash_hi", hash_hi),
        pl.Series("hash_lo", hash_lo),
        *[converted(pl.col(name), rows.schema[name], TIMESTAMP) for name in times],
        pl.col("is_deleted").fill_null(False),
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
        pl.lit(place, pl.UInt32).alias("place"),
    )
    if as_of is not None:
        current = (events["event_time"] <= as_of).fill_null(False)
        events, number = events.filter(current), number[current.to_numpy()]
    write_partitions(events, number, partitions, storage.join(scratch_uri, "events", f"{place:05d}.arrow"))
    return rows.height - events.height


def _choose(number: int, places: int, scratch_uri: str) -> tuple[int, int]:
    """Write the positions of a partition's rows that count. Returns how many are superseded, how many deletions."""
    # In the order of the blocks: of events with equal times the last one counts.
    frames = list(read_partition(storage.list_files(storage.join(scratch_uri, "events")), number))
    if not frames:
        return 0, 0
    events = pl.concat(frames, how="diagonal")
    times = [name for name in TIMES if name in events.columns]
    latest = events.sort(*_ID, *times, maintain_order=True, nulls_last=False).unique(
        _ID, keep="last", maintain_order=True
    )
    live = latest.filter(~pl.col("is_deleted"))
    uri = storage.join(scratch_uri, "kept", f"{number:05d}.arrow")
    write_partitions(live.select("row"), live["place"].cast(pl.Int64).to_numpy(), places, uri)
    return events.height - latest.height, latest.height - live.height
