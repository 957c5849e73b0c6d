"""Finds rows with equal record ids over all fragments of a table, in bounded memory.

Each fragment leaves a file of its ids, in partitions by the first bits of the id. A partition holds all occurrences of
its ids, so partitions are examined one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from step_scripts.data.partitions import read_partition, write_partitions
from step_scripts.runner import storage
from step_scripts.table.hashes import Hash128

_PARTITION_BYTES = 128 << 20  # of CSV: some 2 to 5 million rows
_MOST_PARTITIONS = 1024
_SAME = ["hash_hi", "hash_lo"]


def partition_count(csv_bytes: int) -> int:
    """Number of partitions for files of that size in all."""
    return min(max(1, -(-csv_bytes // _PARTITION_BYTES)), _MOST_PARTITIONS)


def write_ids(uri: str, fragment: int, hashes: Hash128, lines: pl.Series, partitions: int) -> None:
    """Write the hashes of a fragment's record ids, and for each row the line it stands in."""
    ids = pl.DataFrame({"hash_hi": hashes[0], "hash_lo": hashes[1], "line": lines}).with_row_index("row")
    number = ((hashes[0] >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)
    write_partitions(ids.with_columns(pl.lit(fragment, pl.Int32).alias("fragment")), number, partitions, uri)


def find_duplicates(id_uris: Sequence[str], partition: int, uri: str) -> dict[int, int]:
    """Look for equal ids in one partition of all fragments, in order of the rows.

    Returns how many rows of which fragment equal an earlier row. If there are any, the Parquet file `uri` is written:
    fragment, row, line, occurrence (1 for the second of equal rows), first_fragment, first_line.
    """
    ids = pl.concat(read_partition(id_uris, partition))
    ordered = ids["hash_hi"].sort()
    repeated = ordered.filter(ordered == ordered.shift()).unique()
    if repeated.is_empty():
        return {}
    found = (
        ids.filter(pl.col("hash_hi").is_in(repeated.implode()))
        .with_columns(
            pl.int_range(pl.len(), dtype=pl.UInt32).over(_SAME).alias("occurrence"),
            pl.col("fragment").first().over(_SAME).alias("first_fragment"),
            pl.col("line").first().over(_SAME).alias("first_line"),
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
