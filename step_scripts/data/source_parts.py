"""The files of validated rows: one Parquet file for each piece of the source that has any."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from pydantic import BaseModel

from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo
from step_scripts.table.record_ids import lanes_of_ids, record_lanes
from step_scripts.table.spec import TableSpec

_SAMPLED_ROWS = 1000  # of which is told whether values repeat


class ColumnStatistics(BaseModel):
    """Of the valid rows."""

    minimum: float | int | str | bool | None = None
    maximum: float | int | str | bool | None = None
    nulls: int = 0


class PartReport(BaseModel):
    """What the rows of one written part are. `file` is None if no row was left.

    `sums` are the sums, modulo 2^64, of both halves of the rows' 128-bit hashes.
    """

    rows: int = 0
    file: FileInfo | None = None
    sums: tuple[int, int] = (0, 0)
    statistics: dict[str, ColumnStatistics] = {}


def part_name(index: int) -> str:
    """File name of the rows of piece `index`."""
    return f"part-{index:05d}.parquet"


def write_part(
    frame: pl.DataFrame, rows_uri: str, index: int, table: TableSpec, lanes: np.ndarray | None = None
) -> PartReport:
    """Write the rows of piece `index`: record_id, event_time, the table's columns. Returns what they are.

    `lanes` are those of the record ids, if they are known.
    """
    name = part_name(index)
    file = write_parquet(frame, storage.join(rows_uri, name), name)
    return PartReport(
        rows=frame.height,
        file=file,
        sums=_sums(frame, table, lanes),
        statistics={name: _statistics(frame[name]) for name in table.column_names},
    )


def _sums(frame: pl.DataFrame, table: TableSpec, lanes: np.ndarray | None) -> tuple[int, int]:
    if table.key_columns:
        lanes = record_lanes(frame, frame.columns)
    else:  # the record id stands for the row's content
        lane_1, lane_2 = lanes_of_ids(frame["record_id"]) if lanes is None else lanes
        identity = pl.DataFrame({"lane_1": lane_1, "lane_2": lane_2, "event_time": frame["event_time"]})
        lanes = record_lanes(identity, identity.columns)
    first, second = lanes.sum(axis=1, dtype=np.uint64)
    return int(first), int(second)


def rows_digest(parts: Sequence[PartReport], schema: str) -> str:
    """SHA-256, in hexadecimal, of a set of rows: it does not depend on their order, nor on how they are divided."""
    rows = sum(p.rows for p in parts)
    first, second = (sum(p.sums[lane] for p in parts) % 2**64 for lane in (0, 1))
    return hashlib.sha256(f"{schema}\0{rows}\0{first}\0{second}".encode()).hexdigest()


def rows_artifact(uri: str, parts: Sequence[PartReport], table: TableSpec) -> Artifact:
    """The artifact of all parts. Its digest is one of the set of rows: cutting the source otherwise changes nothing."""
    schema = table.model_dump_json(include={"columns": {"__all__": {"name", "dtype"}}, "key_columns": True})
    files = [part.file for part in parts if part.file is not None]
    return Artifact.of(uri, files, digest=rows_digest(parts, schema))


def write_parquet(frame: pl.DataFrame, uri: str, path: str = "") -> FileInfo:
    """Write `frame` in one go; the information on the file needs no second reading.

    By Arrow's writer, which takes each column by itself: the digits of a hash cost LZ4 time and stay as long as they
    are, and a dictionary of values that hardly repeat costs more than it saves.
    """
    repeating = [c.name for c in frame.head(_SAMPLED_ROWS) if c.n_unique() <= _SAMPLED_ROWS // 4]
    buffer = io.BytesIO()
    pq.write_table(
        frame.to_arrow(compat_level=pl.CompatLevel.oldest()),
        buffer,
        compression={name: "none" if name == "record_id" else "lz4" for name in frame.columns},  # pyright: ignore[reportArgumentType]
        use_dictionary=repeating,  # pyright: ignore[reportArgumentType]
        write_statistics=False,  # readers take all rows
    )
    content = buffer.getbuffer()
    with storage.open_output(uri) as file:
        file.write(content)
    return FileInfo(path=path, rows=frame.height, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _statistics(column: pl.Series) -> ColumnStatistics:
    return ColumnStatistics(minimum=_plain(column.min()), maximum=_plain(column.max()), nulls=column.null_count())


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def merged_statistics(parts: Iterable[PartReport]) -> dict[str, ColumnStatistics]:
    """Of the rows of all parts."""
    merged: dict[str, ColumnStatistics] = {}
    for part in parts:
        for name, one in part.statistics.items():
            before = merged.get(name, ColumnStatistics())
            merged[name] = ColumnStatistics(
                minimum=min((v for v in (before.minimum, one.minimum) if v is not None), default=None),  # pyright: ignore
                maximum=max((v for v in (before.maximum, one.maximum) if v is not None), default=None),  # pyright: ignore
                nulls=before.nulls + one.nulls,
            )
    return merged
