"""The comparison of a dataset with a feature group that is still empty, where every record of it occurs once.

Then everything is news, and there is nothing to compare but the records with each other: one number a row goes
through scratch files instead of eleven. Where a record occurs several times, `feature_files` compares events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from step_scripts.feature_store.event_sources import Source, check_complete, read_source
from step_scripts.feature_store.event_timeline import Changes
from step_scripts.feature_store.feature_files import DAY, by_bucket, content_columns
from step_scripts.feature_store.scratch_arrays import load_lanes, save_lanes
from step_scripts.runner import storage
from step_scripts.table.hashes import add_sums, content_hashes, event_hashes, hash_sums, text_hashes
from step_scripts.table.spec import TableSpec


@dataclass(frozen=True)
class SourceSummary:
    """Of all events of one source: first halves of the record ids' hashes, in a file, and in it the start of each
    bucket (and the end of the last); the digest of the events; how many there are of each day.
    """

    path: str
    starts: tuple[int, ...]
    sums: tuple[int, int]
    days: tuple[tuple[int, int], ...]


def summarize_source(source: Source, table: TableSpec, buckets: int, folder: str) -> SourceSummary:
    """Hash the events of `source`.

    Raises `StepError` if it lacks a column, has one of another type, or has empty record ids or event times.
    """
    frame = read_source(source, list(dict.fromkeys(["record_id", "event_time", *content_columns(table)])), table)
    check_complete(frame, source)
    record = text_hashes(frame["record_id"])
    time = frame["event_time"].to_physical().to_numpy()
    sums = hash_sums(event_hashes(record, time, content_hashes(frame, content_columns(table))))
    order, starts = by_bucket(record[0], buckets)
    path = storage.join(folder, f"records-{source.index}.npy")
    save_lanes(path, (record[0] if order is None else record[0][order])[np.newaxis])
    days = zip(*np.unique(time // DAY, return_counts=True), strict=True)
    return SourceSummary(path, starts, sums, tuple((int(day), int(count)) for day, count in days))


def records_differ(bucket: int, summaries: Sequence[SourceSummary]) -> bool:
    """Whether no two records of a bucket have the same first half of their hash."""
    parts = [load_lanes(s.path, 1, np.uint64, s.starts[bucket], s.starts[bucket + 1])[0] for s in summaries]
    records = pl.Series(np.concatenate(parts))
    return records.n_unique() == len(records)


def all_added(summaries: Sequence[SourceSummary]) -> Changes:
    """What such a dataset changes in an empty group, without the events."""
    rows, sums = sum(s.starts[-1] for s in summaries), add_sums(*(s.sums for s in summaries))
    return Changes(added=rows, live_rows=rows, live_added=sums)
