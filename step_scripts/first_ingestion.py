"""The comparison of a dataset with a feature group that is still empty, where every record of it occurs once.

Then everything is news, and there is nothing to compare but the records with each other: one number a row goes
through scratch files instead of eleven. Where a record occurs several times, `feature_files` compares events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from step_scripts import storage
from step_scripts.event_hash import text_hashes
from step_scripts.event_sources import Source, check_complete, read_source
from step_scripts.feature_files import HOUR, by_bucket
from step_scripts.scratch_arrays import load_lanes, save_lanes
from step_scripts.table import TableSpec


@dataclass(frozen=True)
class SourceSummary:
    """Of all events of one source: first halves of the record ids' hashes, in a file, and in it the start of each
    bucket (and the end of the last); how many events there are of each hour.
    """

    path: str
    starts: tuple[int, ...]
    hours: tuple[tuple[int, int], ...]


def summarize_source(source: Source, table: TableSpec, buckets: int, folder: str) -> SourceSummary:
    """Hash the records of `source`.

    Raises `StepError` if it has empty record ids or event times, or lacks these columns.
    """
    frame = read_source(source, ["record_id", "event_time"], table)
    check_complete(frame, source)
    record, _ = text_hashes(frame["record_id"])
    order, starts = by_bucket(record, buckets)
    path = storage.join(folder, f"records-{source.index}.npy")
    save_lanes(path, (record if order is None else record[order])[np.newaxis])
    hours = zip(*np.unique(frame["event_time"].to_physical().to_numpy() // HOUR, return_counts=True), strict=True)
    return SourceSummary(path, starts, tuple((int(hour), int(count)) for hour, count in hours))


def records_differ(bucket: int, summaries: Sequence[SourceSummary]) -> bool:
    """Whether no two records of a bucket have the same first half of their hash."""
    parts = [load_lanes(s.path, 1, np.uint64, s.starts[bucket], s.starts[bucket + 1])[0] for s in summaries]
    records = pl.Series(np.concatenate(parts))
    return records.n_unique() == len(records)
