"""Proofs about Parquet files that need not read all their data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from step_scripts.runner import storage
from step_scripts.runner.wording import counted
from step_scripts.table.spec import ColumnSpec, TableSpec
from step_scripts.table.validation import pandera_schema, polars_schema


def schema_violations(uris: Sequence[str], table: TableSpec, *, sample_rows: int) -> tuple[list[str], dict[str, int]]:
    """What in the files contradicts `table`, and the figures `rows`, `files`, `rows_validated`.

    Names, types, nulls and bounds of all rows are proven by the statistics in the files' footers; the first
    `sample_rows` rows go through pandera, which also sees what footers do not hold (allowed values).
    """
    violations: list[str] = []
    rows = validated = 0
    for uri in uris:
        with storage.open_input(uri) as file:
            parquet = pq.ParquetFile(file)
            rows += parquet.metadata.num_rows
            violations += [f"{uri}: {problem}" for problem in _footer_violations(parquet, table)]
            if not violations and validated < sample_rows:
                batch = next(parquet.iter_batches(sample_rows - validated, columns=list(table.column_names)), None)
                if batch is not None:
                    frame = pl.DataFrame(batch).cast(pl.Schema(polars_schema(table)))
                    validated += frame.height
                    violations += [f"{uri}: {problem}" for problem in pandera_violations(frame, table)]
    return violations, {"rows": rows, "files": len(uris), "rows_validated": validated}


def pandera_violations(frame: pl.DataFrame, table: TableSpec) -> list[str]:
    """What pandera finds wrong with `frame`, one line a column and check."""
    from pandera.errors import SchemaErrors

    try:
        pandera_schema(table).validate(frame.select(table.column_names), lazy=True)
    except SchemaErrors as errors:
        cases = errors.failure_cases.group_by("column", "check").agg(pl.len(), pl.col("failure_case").first())
        return [
            f"{c}: {check} fails in {counted(n, 'row')}, first value {value}" for c, check, n, value in cases.rows()
        ]
    return []


def _footer_violations(parquet: pq.ParquetFile, table: TableSpec) -> Iterator[str]:
    names = parquet.schema_arrow.names
    for column in table.columns:
        if column.name not in names:
            yield f"column {column.name} is missing"
            continue
        index = names.index(column.name)
        for group in range(parquet.metadata.num_row_groups):
            statistics = parquet.metadata.row_group(group).column(index).statistics
            if statistics is not None:
                yield from _out_of_bounds(column, statistics)


def _out_of_bounds(column: ColumnSpec, statistics: Any) -> Iterator[str]:
    if statistics.null_count and not column.nullable:
        yield f"{column.name} has {statistics.null_count} empty values"
    if not statistics.has_min_max or not isinstance(statistics.min, int | float):
        return
    low, high = statistics.min, statistics.max
    if (column.ge is not None and low < column.ge) or (column.gt is not None and low <= column.gt):
        yield f"{column.name} has the value {low}, allowed is {column.constraint()}"
    if (column.le is not None and high > column.le) or (column.lt is not None and high >= column.lt):
        yield f"{column.name} has the value {high}, allowed is {column.constraint()}"


def sampled_record_ids(uris: Sequence[str], *, at_most: int, total: int) -> tuple[pl.Series, float]:
    """Record ids of the rows whose id lies in a fixed part of the id space, and the size of that part.

    The part is everything if `total` rows are no more than `at_most`. Two sets of files sampled with the same figures
    can be compared id by id, in memory that does not grow with the data.
    """
    share = min(1.0, at_most / max(total, 1))
    limit = np.uint64(min(int(share * 2**32), 2**32 - 1))
    found: list[pl.Series] = []
    for uri in uris:
        with storage.open_input(uri) as file:
            ids = pl.read_parquet(file, columns=["record_id"])["record_id"]
        if share < 1.0:
            prefix = ids.str.slice(0, 8).str.to_integer(base=16, dtype=pl.UInt64)
            ids = ids.filter(prefix <= limit)
        found.append(ids)
    return (pl.concat(found) if found else pl.Series("record_id", [], dtype=pl.String)), share
