"""Finds rows with equal record ids over all parts of a table, in bounded memory.

Each part leaves a file of its ids, arranged in buckets by the first bits of the id. A bucket holds all occurrences of
its ids, so buckets are examined one by one: only the first 64 bits are sorted, the others are read where those agree.
A file of ids: offsets of the buckets (int64, one more than buckets), then for all rows in order of bucket and row
lane 1, lane 2 (uint64), row in the part (uint32), line in the piece (uint32).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import numpy as np
import polars as pl

from step_scripts.data.source_parts import PartReport, part_name, write_part
from step_scripts.runner import storage
from step_scripts.table.spec import TableSpec

BUCKET_BYTES = 256 << 20  # of CSV: some 5 to 10 million rows
MOST_BUCKETS = 1024
_COLUMNS = (("lane_1", np.uint64), ("lane_2", np.uint64), ("row", np.uint32), ("line", np.uint32))


def bucket_count(csv_bytes: int) -> int:
    """Number of buckets for files of that size in all."""
    return min(max(1, -(-csv_bytes // BUCKET_BYTES)), MOST_BUCKETS)


def write_ids(uri: str, lanes: np.ndarray, lines: np.ndarray, buckets: int) -> None:
    """Write the ids of a part: `lanes` of shape (2, rows), and for each row the line it stands in."""
    rows = np.arange(lanes.shape[1], dtype=np.uint32)
    offsets = np.array([0, len(rows)], dtype=np.int64)
    columns = [lanes[0], lanes[1], rows, lines.astype(np.uint32)]
    if buckets > 1:
        bucket = ((lanes[0] >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint16)
        order = np.argsort(bucket, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=buckets))]).astype(np.int64)
        columns = [column[order] for column in columns]
    with storage.open_output(uri) as file:
        file.write(offsets.tobytes())
        for column in columns:
            file.write(np.ascontiguousarray(column).data)


def _read(file: IO[bytes], buckets: int, bucket: int, name: str) -> np.ndarray:
    offsets = _at(file, 0, buckets + 1, np.int64)
    start = offsets.nbytes
    for column, dtype in _COLUMNS:
        width = np.dtype(dtype).itemsize
        if column == name:
            return _at(file, start + int(offsets[bucket]) * width, int(offsets[bucket + 1] - offsets[bucket]), dtype)
        start += int(offsets[-1]) * width
    raise KeyError(name)


def _at(file: IO[bytes], position: int, count: int, dtype: type) -> np.ndarray:
    file.seek(position)
    return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)


def _column(uris: Sequence[str], buckets: int, bucket: int, name: str) -> list[np.ndarray]:
    arrays = []
    for uri in uris:
        with storage.open_input(uri) as file:
            arrays.append(_read(file, buckets, bucket, name))
    return arrays


def find_duplicates(
    id_uris: Sequence[str], parts: Sequence[int], buckets: int, bucket: int, uri: str
) -> dict[int, int]:
    """Look for equal ids in one bucket of all parts; `id_uris[i]` belongs to part `parts[i]`, in order of the rows.

    Returns how many rows of which part equal an earlier row. If there are any, the Parquet file `uri` is written: part,
    row, line, occurrence (1 for the second of equal rows), first_part, first_line.
    """
    arrays = _column(id_uris, buckets, bucket, "lane_1")
    hashes = np.concatenate(arrays)
    ordered = pl.Series(hashes).sort().to_numpy()  # by their digits: numpy compares, which takes four times as long
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(repeated):
        return {}
    place = np.searchsorted(repeated, hashes)
    place[place == len(repeated)] = 0
    rows = np.flatnonzero(repeated[place] == hashes)
    part = np.repeat(np.asarray(parts, dtype=np.int32), [len(a) for a in arrays])[rows]
    candidates = pl.DataFrame(
        {
            "part": part,
            "row": np.concatenate(_column(id_uris, buckets, bucket, "row"))[rows],
            "line": np.concatenate(_column(id_uris, buckets, bucket, "line"))[rows],
            "lane_1": hashes[rows],
            "lane_2": np.concatenate(_column(id_uris, buckets, bucket, "lane_2"))[rows],
        }
    )
    same = ["lane_1", "lane_2"]
    found = candidates.with_columns(
        pl.int_range(pl.len(), dtype=pl.UInt32).over(same).alias("occurrence"),
        pl.col("part").first().over(same).alias("first_part"),
        pl.col("line").first().over(same).alias("first_line"),
    ).filter(pl.col("occurrence") > 0)
    if found.is_empty():
        return {}
    with storage.open_output(uri) as file:
        found.drop(same).write_parquet(file)
    return dict(found.group_by("part").len().iter_rows())


def rewrite_part(duplicate_uris: Sequence[str], part: int, rows_uri: str, table: TableSpec, keep: bool) -> PartReport:
    """Write part `part` again: without the rows that equal an earlier row, or (`keep`) with ids of their own.

    The second of equal rows gets the suffix `-1`, the third `-2`. Not atomic: the part is seen by nobody yet.
    """
    frames = []
    for uri in duplicate_uris:
        with storage.open_input(uri) as file:
            frames.append(pl.read_parquet(file).filter(pl.col("part") == part).select("row", "occurrence"))
    with storage.open_input(storage.join(rows_uri, part_name(part))) as file:
        frame = pl.read_parquet(file.read()).with_row_index("row")
    joined = frame.join(pl.concat(frames), on="row", how="left", maintain_order="left")
    if keep:
        suffixed = pl.concat_str("record_id", pl.lit("-"), pl.col("occurrence").cast(pl.String))
        joined = joined.with_columns(pl.coalesce(suffixed, "record_id").alias("record_id"))
    else:
        joined = joined.filter(pl.col("occurrence").is_null())
    return write_part(joined.drop("row", "occurrence"), rows_uri, part, table)


def first_duplicates(duplicate_uris: Sequence[str], limit: int) -> pl.DataFrame:
    """The first `limit` rows that equal an earlier row: part, row, line, occurrence, first_part, first_line."""
    found: list[pl.DataFrame] = []
    for uri in duplicate_uris:
        with storage.open_input(uri) as file:
            frame = pl.read_parquet(file)
        found = [pl.concat([*found, frame]).sort("part", "row").head(limit)]
    return found[0]
