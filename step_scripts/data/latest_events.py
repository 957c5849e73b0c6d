"""Which events of a feature group count at a point in time: of each record the latest one, unless it is a deletion.

Events of a record may lie in any block. Rows stay where they are: what meets, in files by hash of the id, are ids,
times and positions. What comes back are the positions of the rows that count, in files by block.
"""

from __future__ import annotations

import io
from datetime import datetime
from typing import NamedTuple

import numpy as np
import polars as pl

from step_scripts.runner import storage
from step_scripts.runner.contract import Reporter
from step_scripts.runner.ray_data import PATH, ParquetBlocks, Progress, each_call
from step_scripts.table.column_types import TIMESTAMP, converted
from step_scripts.table.record_ids import distinct_lanes, lanes_of_ids, split_fraction_of_lanes

# In order of precedence: the latest event wins; of equal ones, the one that was written last.
TIMES = ("event_time", "api_invocation_time", "write_time")
_ROWS_A_BUCKET = 2_000_000
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
        found = [_read(uri)["row"].to_numpy() for uri in storage.list_files(_kept_uri(self.uri, place))]
        kept = np.zeros(rows.height, dtype=bool)
        for positions in found:
            kept[positions] = True
        return rows.filter(pl.Series(kept))


def latest_events(blocks: ParquetBlocks, as_of: datetime | None, scratch_uri: str, log: Reporter) -> LatestEvents:
    """Find them among `blocks`, with columns `record_id`, `is_deleted` and those of `TIMES` that there are.

    What is written goes below `scratch_uri`.
    """
    buckets = max(1, -(-blocks.rows // _ROWS_A_BUCKET))
    progress = Progress(log, "prepare_splits, bringing events of a record together", blocks.rows)
    arguments = (blocks.files, as_of, scratch_uri, buckets)
    scattered = blocks.reports(_scatter, *arguments, progress=progress)
    chosen = [counts for _, counts in each_call(_choose, [(number, scratch_uri) for number in range(buckets)])]
    return LatestEvents(
        uri=scratch_uri,
        read=blocks.rows,
        later=sum(scattered),
        superseded=sum(superseded for superseded, _ in chosen),
        deleted=sum(deleted for _, deleted in chosen),
    )


def _scatter(rows: pl.DataFrame, files: dict[str, int], as_of: datetime | None, scratch_uri: str, buckets: int) -> int:
    """Write ids, times and positions of a block's events, a file a bucket. Returns how many are later than `as_of`."""
    place = files[rows[PATH][0]]
    times = [name for name in TIMES if name in rows.columns]
    lanes = lanes_of_ids(rows["record_id"])
    bucket = (split_fraction_of_lanes(lanes, _SALT) * buckets).astype(np.int32)
    ids = distinct_lanes(rows["record_id"], lanes)
    moments = [converted(pl.col(name), rows.schema[name], TIMESTAMP) for name in times]
    events = rows.select(
        pl.Series("id", ids[0]), pl.Series("id_2", ids[1]), *moments,
        pl.col("is_deleted").fill_null(False), pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
        pl.lit(place, pl.UInt32).alias("place"), pl.Series("bucket", bucket),
    )  # fmt: skip
    current = events.filter(pl.col("event_time") <= as_of) if as_of is not None else events
    for (number,), group in current.partition_by("bucket", as_dict=True, include_key=False).items():
        _write(group, storage.join(_bucket_uri(scratch_uri, int(number)), f"{place:05d}.arrow"))
    return events.height - current.height


def _choose(number: int, scratch_uri: str) -> tuple[int, int]:
    """Write the positions of a bucket's rows that count. Returns how many events are superseded, how many deletions."""
    # In the order of the blocks: of events with equal times the last one counts.
    frames = [_read(uri) for uri in storage.list_files(_bucket_uri(scratch_uri, number))]
    if not frames:
        return 0, 0
    events = pl.concat(frames, how="diagonal")
    times = [name for name in TIMES if name in events.columns]
    latest = events.sort("id", "id_2", *times, maintain_order=True, nulls_last=False).unique(
        ["id", "id_2"], keep="last", maintain_order=True
    )
    live = latest.filter(~pl.col("is_deleted"))
    for (place,), group in live.select("place", "row").partition_by("place", as_dict=True, include_key=False).items():
        _write(group, storage.join(_kept_uri(scratch_uri, place), f"{number:05d}.arrow"))
    return events.height - latest.height, latest.height - live.height


def _bucket_uri(scratch_uri: str, number: int) -> str:
    return storage.join(scratch_uri, f"events-{number:05d}")


def _kept_uri(scratch_uri: str, place: int) -> str:
    return storage.join(scratch_uri, f"kept-{place:05d}")


def _write(frame: pl.DataFrame, uri: str) -> None:
    buffer = io.BytesIO()
    frame.write_ipc(buffer)
    storage.write_bytes(uri, buffer.getvalue())


def _read(uri: str) -> pl.DataFrame:
    return pl.read_ipc(storage.read_bytes(uri))
