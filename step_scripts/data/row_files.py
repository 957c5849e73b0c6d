"""Files of rows: written, compared with the table, and looked through for equal record ids.

Duplicates are found without the rows: what meets, in partitions by hash, are ids and their places.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from step_scripts.runner import storage
from step_scripts.runner.contract import FileInfo
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import polars_schema, violations
from step_scripts.table.hashes import Hash128, hashes_of_ids, partition_of, read_partition, write_partitions
from step_scripts.table.spec import TableSpec

_SAMPLED_ROWS = 1000  # that tell whether a column's values repeat
_PARTITION_BYTES = 128 << 20  # of CSV: some 2 to 5 million rows
_MOST_PARTITIONS = 1024
_ID = ["hash_hi", "hash_lo"]


def write_parquet(frame: pl.DataFrame, folder_uri: str, path: str, compression: Any = "zstd") -> FileInfo:
    """Write `frame` to `path` below a folder in one go; the information on the file needs no second reading.

    By Arrow's writer, which takes each column by itself: `compression` may be one for all columns or one for each. A
    dictionary of values that hardly repeat costs more than it saves. Not atomic: a manifest commits the file.
    """
    repeating = [c.name for c in frame.head(_SAMPLED_ROWS) if c.n_unique() <= _SAMPLED_ROWS // 4]
    buffer = io.BytesIO()
    pq.write_table(
        frame.to_arrow(compat_level=pl.CompatLevel.oldest()),
        buffer,
        compression=compression,
        use_dictionary=repeating,  # pyright: ignore[reportArgumentType]
        write_statistics=False,  # readers take all rows
    )
    content = buffer.getbuffer()
    with storage.open_output(storage.join(folder_uri, path)) as file:
        file.write(content)
    return FileInfo(path=path, rows=frame.height, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def schema_violations(uris: Sequence[str], table: TableSpec, *, sample_rows: int) -> tuple[list[str], dict[str, int]]:
    """What in the files contradicts `table`, and the figures `rows`, `files`, `rows_validated`.

    All files must have the columns. Types and values are checked in the first `sample_rows` rows, up to the first file
    that contradicts.
    """
    found: list[str] = []
    rows = validated = 0
    names = list(table.column_names)
    for uri in uris:
        with storage.open_input(uri) as file:
            parquet = pq.ParquetFile(file)
            rows += parquet.metadata.num_rows
            missing = [name for name in names if name not in parquet.schema_arrow.names]
            found += [f"{uri}: column {name} is missing" for name in missing]
            if found or validated >= sample_rows:
                continue
            frame = pl.DataFrame(parquet.read(names))[: sample_rows - validated]
            found += [f"{uri}: {problem}" for problem in _violations(frame, table)]
            validated += frame.height
    return found, {"rows": rows, "files": len(uris), "rows_validated": validated}


def _violations(frame: pl.DataFrame, table: TableSpec) -> list[str]:
    """What is wrong with a frame, one line a column and problem."""
    try:
        typed = frame.cast(pl.Schema(polars_schema(table)))
    except pl.exceptions.PolarsError as error:
        return [f"a column has another type: {error}"]
    cells = violations(typed, table)
    groups = cells.group_by("column", "problem", maintain_order=True).agg(pl.len(), pl.col("row").first())
    return [
        f"{column} {problem} in {counted(count, 'row')}, first value {typed[column][row]}"
        for column, problem, count, row in groups.iter_rows()
    ]


def sampled_record_ids(uris: Sequence[str], *, at_most: int, total: int) -> tuple[pl.Series, float]:
    """Record ids of the rows whose id lies in a fixed part of the id space, and the size of that part.

    The part is everything if `total` rows are no more than `at_most`. Two sets of files sampled with the same figures
    can be compared id by id, in memory that does not grow with the data.
    """
    share = min(1.0, at_most / max(total, 1))
    found: list[pl.Series] = []
    for uri in uris:
        with storage.open_input(uri) as file:
            ids = pl.read_parquet(file, columns=["record_id"])["record_id"]
        if share < 1.0:
            ids = ids.filter(pl.Series(hashes_of_ids(ids)[0] < np.uint64(share * 2**64)))
        found.append(ids)
    return (pl.concat(found) if found else pl.Series("record_id", [], dtype=pl.String)), share


# Rows with equal record ids.


def partition_count(csv_bytes: int) -> int:
    """Number of partitions for files of that size in all."""
    return min(max(1, -(-csv_bytes // _PARTITION_BYTES)), _MOST_PARTITIONS)


def write_ids(uri: str, fragment: int, hashes: Hash128, lines: pl.Series, partitions: int) -> None:
    """Write the hashes of a fragment's record ids, and for each row the line it stands in."""
    ids = pl.DataFrame([*map(pl.Series, _ID, hashes), lines.alias("line")]).with_row_index("row")
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
