"""Divides the records of a block among the splits."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from step_scripts.data.latest_events import LatestEvents
from step_scripts.runner import storage
from step_scripts.runner.contract import FileInfo
from step_scripts.runner.ray_data import PATH
from step_scripts.table.column_types import TIMESTAMP, columns_as, polars_schema
from step_scripts.table.distributions import TableSketch
from step_scripts.table.moments import Moments
from step_scripts.table.record_ids import distinct_lanes, lanes_of_ids, split_fraction_of_lanes
from step_scripts.table.row_set_digest import RowSetDigest
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
    parts: int
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
    lanes = lanes_of_ids(live["record_id"])
    fractions = split_fraction_of_lanes(lanes, plan.salt)
    ids = distinct_lanes(live["record_id"], lanes)
    train, below = (fractions < limit for limit in plan.limits)
    sides = {"train": train, "validation": below & ~train, "test": ~below}
    rows = live.select("record_id", *plan.table.column_names)
    chosen = {split: rows.filter(pl.Series(side)) for split, side in sides.items()}
    with ThreadPoolExecutor(1) as disk:  # which makes one wait for it
        writing = {split: _write_parts(plan, plan.uris[split], place, frame, disk) for split, frame in chosen.items()}
        values = chosen["train"].select(pl.col(plan.statistics_columns).cast(pl.Float64)).to_numpy()
        digests = {
            split: RowSetDigest.of(frame, plan.table.column_names, (ids[0, sides[split]], ids[1, sides[split]]))
            for split, frame in chosen.items()
        }
        moments, sketch = Moments.of(values[:, :-1]), TableSketch.of(values, fractions[train])
        files = {split: [stored.result() for stored in parts] for split, parts in writing.items()}
    return SplitReport(files=files, digests=digests, moments=moments, sketch=sketch)


def _write_parts(plan: SplitPlan, uri: str, place: int, rows: pl.DataFrame, disk: Executor) -> list[Future[FileInfo]]:
    size = max(1, -(-rows.height // plan.parts))
    writing = []
    for part, frame in enumerate(rows.iter_slices(size) if rows.height else ()):
        path = f"part-{place * plan.parts + part:05d}.parquet"
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", compression_level=1, statistics=False)  # readers take all rows
        writing.append(disk.submit(_store, storage.join(uri, path), path, frame.height, buffer.getvalue()))
    return writing


def _store(uri: str, path: str, rows: int, content: bytes) -> FileInfo:
    storage.write_bytes(uri, content)
    return FileInfo(path=path, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
