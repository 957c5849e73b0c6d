"""Arrow files with one record batch for each partition, so that rows of different blocks meet.

Each block leaves one such file, divided by a hash of a key: a partition holds all rows of its keys and is read without
the others, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from step_scripts.runner import storage


def partition_of(hash_hi: np.ndarray, count: int) -> np.ndarray:
    """The partition of each key, given by 64 bits of its hash."""
    return ((hash_hi >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def write_partitions(frame: pl.DataFrame, partition: np.ndarray, count: int, uri: str) -> None:
    """Write the rows of `frame`, of which `partition` holds the number, from 0 and below `count`."""
    rows_in_order = frame[np.argsort(partition, kind="stable")] if count > 1 else frame
    ends = np.cumsum(np.bincount(partition, minlength=count))
    arrays = [column.to_arrow(compat_level=pl.CompatLevel.oldest()) for column in rows_in_order]
    rows = pa.RecordBatch.from_arrays(arrays, names=frame.columns)
    with storage.open_output(uri) as file, pa.ipc.new_file(file, rows.schema) as writer:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            writer.write_batch(rows.slice(start, end - start))


def read_partition(uris: Sequence[str], number: int) -> Iterator[pl.DataFrame]:
    """The rows of partition `number` of each file, in the order in which they were written."""
    for uri in uris:
        with storage.open_input(uri) as file:
            yield pl.DataFrame(pa.ipc.open_file(file).get_batch(number))
