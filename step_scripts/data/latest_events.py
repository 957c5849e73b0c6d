"""Which events of a feature group count at a point in time: of each record the latest one, unless it is a deletion.

Events of a record may lie in any block. Rows stay where they are: what meets, in partitions by hash of the id, are ids,
times and positions. What comes back are the positions of the rows that count, in partitions by block.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import numpy as np
import polars as pl

from step_scripts.data.partitions import read_partition, write_partitions
from step_scripts.runner import storage
from step_scripts.runner.contract import Reporter
from step_scripts.runner.ray_data import PATH, ParquetBlocks, Progress, each_call
from step_scripts.table.column_types import TIMESTAMP, converted
from step_scripts.table.record_ids import distinct_hashes, hashes_of_ids, split_fraction_of_hashes

# In order of precedence: the latest event wins; of equal ones, the one that was written last.
TIMES = ("event_time", "api_invocation_time", "write_time")
_PARTITION_ROWS = 2_000_000
_SALT = "events of a record"


class LatestEvents(NamedTuple):
    """Where the positions are, how many events there were, and how many of them do not count, by reason."""

    uri: str
    read: int
    later: int
    superseded: int
    deleted: int

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
    return LatestEvents(
        uri=scratch_uri,
        read=blocks.rows,
        later=sum(later),
        superseded=sum(superseded for superseded, _ in chosen),
        deleted=sum(deleted for _, deleted in chosen),
    )


def _scatter(
    rows: pl.DataFrame, files: dict[str, int], as_of: datetime | None, scratch_uri: str, partitions: int
) -> int:
    """Write ids, times and positions of a block's events. Returns how many are later than `as_of`."""
    place = files[rows[PATH][0]]
    times = [name for name in TIMES if name in rows.columns]
    hashes = hashes_of_ids(rows["record_id"])
    number = (split_fraction_of_hashes(hashes, _SALT) * partitions).astype(np.int64)
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
    latest = events.sort("hash_hi", "hash_lo", *times, maintain_order=True, nulls_last=False).unique(
        ["hash_hi", "hash_lo"], keep="last", maintain_order=True
    )
    live = latest.filter(~pl.col("is_deleted"))
    uri = storage.join(scratch_uri, "kept", f"{number:05d}.arrow")
    write_partitions(live.select("row"), live["place"].cast(pl.Int64).to_numpy(), places, uri)
    return events.height - latest.height, latest.height - live.height
