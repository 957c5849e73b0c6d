"""Divides the records of a block among the splits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from step_scripts.data.latest_events import LatestEvents
from step_scripts.data.parquet_files import write_parquet
from step_scripts.runner.contract import FileInfo
from step_scripts.runner.ray_data import PATH
from step_scripts.table.column_types import TIMESTAMP, columns_as, polars_schema
from step_scripts.table.distributions import TableSketch
from step_scripts.table.hashes import RowSetDigest
from step_scripts.table.moments import Moments
from step_scripts.table.record_ids import distinct_hashes, hashes_of_ids, split_fraction_of_hashes
from step_scripts.table.spec import TableSpec

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitPlan:
    """What every task has to know.

    `uris` are the prefixes of the three outputs, `places` tells the order of the files that are read. `latest` says
    which rows count; without it, each record has one event.
    """

    table: TableSpec
    uris: dict[str, str]
    limits: tuple[float, float]
    salt: str
    as_of: datetime | None
    files_per_block: int
    places: dict[str, int]
    latest: LatestEvents | None = None

    @property
    def statistics_columns(self) -> tuple[str, ...]:
        """Features, then the target."""
        return (*self.table.features, self.table.target)


@dataclass
class SplitReport:
    """What became of a block: rows read and left out, files written, and statistics of the training rows."""

    files: dict[str, list[FileInfo]]
    digests: dict[str, RowSetDigest]
    moments: Moments
    sketch: TableSketch
    rows_read: int = 0
    rows_later: int = 0
    rows_deleted: int = 0

    @property
    def rows_live(self) -> int:
        """Rows written."""
        return sum(digest.rows for digest in self.digests.values())


def split_rows(rows: pl.DataFrame, plan: SplitPlan) -> SplitReport:
    """Divide the records of a block among the splits. Files are named by the place of the block's first file."""
    place = plan.places[rows[PATH][0]]
    frame = _typed(rows, plan)
    if plan.latest is not None:
        return _write(plan, place, plan.latest.of(frame, place))
    current = frame.filter(pl.col("event_time") <= plan.as_of) if plan.as_of is not None else frame
    live = current.filter(~pl.col("is_deleted")) if current["is_deleted"].any() else current
    report = _write(plan, place, live)
    report.rows_read, report.rows_later = frame.height, frame.height - current.height
    report.rows_deleted = current.height - live.height
    return report


def _typed(rows: pl.DataFrame, plan: SplitPlan) -> pl.DataFrame:
    """The rows in the table's types. Files from before a nullable column was added to the table do not have it."""
    types: dict[str, Any] = {**polars_schema(plan.table), "event_time": TIMESTAMP}
    return rows.with_columns(*columns_as(rows.schema, types), pl.col("is_deleted").fill_null(False))


def _write(plan: SplitPlan, place: int, live: pl.DataFrame) -> SplitReport:
    hashes = hashes_of_ids(live["record_id"])
    fractions = split_fraction_of_hashes(hashes, plan.salt)
    hash_hi, hash_lo = distinct_hashes(live["record_id"], hashes)
    train, below = (fractions < limit for limit in plan.limits)
    rows = live.select("record_id", *plan.table.column_names)
    files: dict[str, list[FileInfo]] = {}
    digests: dict[str, RowSetDigest] = {}
    for split, side in {"train": train, "validation": below & ~train, "test": ~below}.items():
        chosen = rows.filter(pl.Series(side))
        files[split] = _write_files(plan, plan.uris[split], place, chosen)
        digests[split] = RowSetDigest.of((hash_hi[side], hash_lo[side]), chosen, plan.table.column_names)
    columns = pl.col(plan.statistics_columns).cast(pl.Float64)
    values = rows.filter(pl.Series(train)).select(columns).to_numpy()
    moments, sketch = Moments.of(values[:, :-1]), TableSketch.of(values, fractions[train])
    return SplitReport(files=files, digests=digests, moments=moments, sketch=sketch)


def _write_files(plan: SplitPlan, uri: str, place: int, rows: pl.DataFrame) -> list[FileInfo]:
    size = max(1, -(-rows.height // plan.files_per_block))
    return [
        write_parquet(frame, uri, f"part-{place * plan.files_per_block + number:05d}.parquet")
        for number, frame in enumerate(rows.iter_slices(size) if rows.height else ())
    ]
