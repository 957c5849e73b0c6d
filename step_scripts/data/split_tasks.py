"""The tasks of step `prepare_splits`: divide the records of a piece, or of a bucket of records, among the splits."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from step_scripts.runner import storage
from step_scripts.runner.contract import FileInfo
from step_scripts.table.distributions import TableSketch
from step_scripts.table.moments import Moments
from step_scripts.runner.ray_tasks import Piece, read_part
from step_scripts.table.record_ids import distinct_lanes, lanes_of_ids, split_fraction, split_fraction_of_lanes
from step_scripts.table.row_set_digest import RowSetDigest
from step_scripts.table.spec import TableSpec
from step_scripts.table.validation import polars_schema

SPLITS = ("train", "validation", "test")
# In order of precedence: the latest event wins; of equal ones, the one that was written last.
TIMES = ("event_time", "api_invocation_time", "write_time")
_UTC_TIME = pl.Datetime("us", "UTC")


@dataclass(frozen=True)
class SplitPlan:
    """What every task has to know. `uris` are the prefixes of the three outputs."""

    table: TableSpec
    uris: dict[str, str]
    limits: tuple[float, float]
    salt: str
    as_of: datetime | None
    parts: int

    @property
    def statistics_columns(self) -> tuple[str, ...]:
        """Features, then the target."""
        return (*self.table.features, self.table.target)


@dataclass
class SplitReport:
    """What one task has done: rows read and left out, files written, and statistics of the training rows."""

    files: dict[str, list[FileInfo]]
    digests: dict[str, RowSetDigest]
    moments: Moments
    sketch: TableSketch | None
    rows_read: int = 0
    rows_later: int = 0
    rows_superseded: int = 0
    rows_deleted: int = 0

    @property
    def rows_live(self) -> int:
        """Rows written."""
        return sum(digest.rows for digest in self.digests.values())


def split_piece(plan: SplitPlan, index: int, piece: Piece) -> SplitReport:
    """Divide the records of one piece, none of which has two events."""
    frame, later = _read(plan, piece)
    live = frame.filter(~pl.col("is_deleted")) if frame["is_deleted"].any() else frame
    report = _write(plan, index, live)
    report.rows_read, report.rows_later = frame.height + later, later
    report.rows_deleted = frame.height - live.height
    return report


def _read(plan: SplitPlan, piece: Piece) -> tuple[pl.DataFrame, int]:
    """Rows up to `as_of`, in the table's types, and the number of later ones."""
    # Files from before a nullable column was added to the table do not have it.
    added = [column.name for column in plan.table.columns if column.nullable]
    needed = dict.fromkeys(("record_id", "event_time", "is_deleted", *plan.table.column_names))
    required = [name for name in needed if name not in added]
    parts = [read_part(part, required, optional=(*TIMES[1:], *added)) for part in piece.parts]
    frame = pl.concat(parts, how="diagonal")
    frame = frame.with_columns(pl.lit(None).alias(name) for name in added if name not in frame.columns)
    times = [name for name in TIMES if name in frame.columns]
    types: dict[Any, Any] = {**dict(polars_schema(plan.table)), **dict.fromkeys(times, _UTC_TIME)}
    frame = frame.cast(types).with_columns(pl.col("is_deleted").fill_null(False))
    if plan.as_of is None:
        return frame, 0
    current = frame.filter(pl.col("event_time") <= plan.as_of)
    return current, frame.height - current.height


def _write(plan: SplitPlan, index: int, live: pl.DataFrame) -> SplitReport:
    lanes = lanes_of_ids(live["record_id"])
    fractions = split_fraction_of_lanes(lanes, plan.salt)
    ids = distinct_lanes(live["record_id"], lanes)
    train, below = (fractions < limit for limit in plan.limits)
    sides = {"train": train, "validation": below & ~train, "test": ~below}
    rows = live.select("record_id", *plan.table.column_names)
    chosen = {split: rows.filter(pl.Series(side)) for split, side in sides.items()}
    with ThreadPoolExecutor(1) as disk:  # which makes one wait for it
        writing = {split: _write_parts(plan, plan.uris[split], index, frame, disk) for split, frame in chosen.items()}
        values = chosen["train"].select(pl.col(plan.statistics_columns).cast(pl.Float64)).to_numpy()
        digests = {
            split: RowSetDigest.of(frame, plan.table.column_names, (ids[0, sides[split]], ids[1, sides[split]]))
            for split, frame in chosen.items()
        }
        moments, sketch = Moments.of(values[:, :-1]), TableSketch.of(values, fractions[train])
        files = {split: [stored.result() for stored in parts] for split, parts in writing.items()}
    return SplitReport(files=files, digests=digests, moments=moments, sketch=sketch)


def _write_parts(plan: SplitPlan, uri: str, index: int, rows: pl.DataFrame, disk: Executor) -> list[Future[FileInfo]]:
    size = max(1, -(-rows.height // plan.parts))
    writing = []
    for part, frame in enumerate(rows.iter_slices(size) if rows.height else ()):
        path = f"part-{index * plan.parts + part:05d}.parquet"
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", compression_level=1, statistics=False)  # readers take all rows
        writing.append(disk.submit(_store, storage.join(uri, path), path, frame.height, buffer.getvalue()))
    return writing


def _store(uri: str, path: str, rows: int, content: bytes) -> FileInfo:
    storage.write_bytes(uri, content)
    return FileInfo(path=path, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def scatter_piece(plan: SplitPlan, piece: Piece, buckets: int) -> tuple[Any, ...]:
    """(Rows read, rows later than `as_of`), then one Arrow table a bucket."""
    frame, later = _read(plan, piece)
    # Not the splits' own hash: a bucket would then hold rows of one split only.
    bucket = (split_fraction(frame["record_id"], f"{plan.salt}/bucket") * buckets).astype(np.int32)
    tables = [frame.filter(pl.Series(bucket == index)).to_arrow() for index in range(buckets)]
    return ((frame.height + later, later), *tables)


def split_bucket(plan: SplitPlan, index: int, *tables: pa.Table) -> SplitReport:
    """Keep the latest event of each record of a bucket, unless it says that the record is deleted, and divide them."""
    frames = [pl.DataFrame(table) for table in tables]
    frame = pl.concat([f for f in frames if f.height] or frames[:1], how="diagonal")
    times = [name for name in TIMES if name in frame.columns]
    latest = frame.sort("record_id", *times, maintain_order=True, nulls_last=False).unique(
        "record_id", keep="last", maintain_order=True
    )
    live = latest.filter(~pl.col("is_deleted"))
    report = _write(plan, index, live)
    report.rows_superseded = frame.height - latest.height
    report.rows_deleted = latest.height - live.height
    return report
