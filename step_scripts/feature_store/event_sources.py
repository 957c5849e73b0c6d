"""Where events are read from: some Parquet files of a dataset, or of a feature group."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from step_scripts.feature_store.event_schema import event_types, row_types
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import columns_as
from step_scripts.table.spec import TableSpec


@dataclass(frozen=True)
class Source:
    """Rows `offset` to `offset + rows` of some Parquet files, one after the other: small files whole, or a slice.

    Of the dataset; or of the group, then `stored` has the types of the columns in the files.
    """

    index: int
    uris: tuple[str, ...]
    offset: int
    rows: int
    stored: Mapping[str, Any] | None = None


def dataset_sources(dataset: Artifact, most_rows: int) -> list[Source]:
    """The Parquet files of a dataset, divided and grouped into sources of up to `most_rows` rows."""
    files = [(storage.join(dataset.uri, f.path), f.rows) for f in dataset.files if f.path.endswith(".parquet")]
    sources: list[Source] = []
    for uris, rows in _grouped([(uri, _rows_of(uri) if rows is None else rows) for uri, rows in files], most_rows):
        for offset in range(0, rows, most_rows):
            sources.append(Source(len(sources), uris, offset, min(most_rows, rows - offset)))
    return sources


def stored_sources(
    first_index: int, files: Sequence[tuple[str, int]], most_rows: int, stored: Mapping[str, Any]
) -> list[Source]:
    """Stored files, given as (URI, rows), grouped into sources of up to `most_rows` rows, or of one file."""
    groups = enumerate(_grouped(files, most_rows), first_index)
    return [Source(index, uris, 0, rows, stored) for index, (uris, rows) in groups]


def read_source(
    source: Source, columns: Sequence[str], table: TableSpec, rows: pl.Series | None = None
) -> pl.DataFrame:
    """Columns of `source`, all its rows or those at given positions. Columns that stored files lack are null.

    Raises `StepError` if a file cannot be read, lacks a column, or has one of another type.
    """
    types = source.stored if source.stored is not None else row_types(table)
    wanted = event_types(table)
    try:
        events = pl.scan_parquet(
            [_file(uri) for uri in source.uris],  # pyright: ignore[reportArgumentType]
            schema=types,  # pyright: ignore[reportArgumentType]
            missing_columns="raise" if source.stored is None else "insert",
            extra_columns="ignore",
            hive_partitioning=False,
            glob=False,
        )
        chosen = columns_as(types, {name: wanted[name] for name in columns})
        result = events.slice(source.offset, source.rows).select(chosen).collect()
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise StepError(_explained(source, types, error)) from error
    if result.height != source.rows:
        raise StepError(f"{source.uris[0]} and those after it have fewer rows than they should. Make them again")
    return result if rows is None or len(rows) == source.rows else result[rows]


def check_complete(ids: pl.DataFrame, source: Source) -> None:
    """Raise `StepError` if a row has no record id or no event time."""
    for name in ("record_id", "event_time"):
        if empty := ids[name].null_count():
            raise StepError(
                f"{source.uris[0]}: {empty:,} of {counted(source.rows, 'row')} without {name}. Make its asset again"
            )


def _grouped(files: Sequence[tuple[str, int]], most_rows: int) -> Iterator[tuple[tuple[str, ...], int]]:
    """Consecutive files with up to `most_rows` rows together, or one file: their URIs and rows."""
    group: list[str] = []
    held = 0
    for uri, rows in files:
        if group and held + rows > most_rows:
            yield tuple(group), held
            group, held = [], 0
        group.append(uri)
        held += rows
    if group:
        yield tuple(group), held


def _file(uri: str) -> Any:
    return io.BytesIO(storage.read_bytes(uri)) if storage.is_remote(uri) else storage.local_path(uri)


def _explained(source: Source, types: Mapping[str, Any], error: Exception) -> str:
    """Which file is to blame, and what is wrong with it."""
    remedy = "Make its asset again" if source.stored is None else "Restore it from a backup, or delete the group"
    for uri in source.uris:
        try:
            schema = pl.read_parquet_schema(_file(uri))
        except (FileNotFoundError, pl.exceptions.PolarsError) as reason:
            return f"{uri} cannot be read ({reason}). {remedy}"
        if source.stored is None and (missing := [name for name in types if name not in schema]):
            return f"{uri} lacks the columns {missing}; it has {list(schema)}. {remedy}"
        if wrong := [f"{n} is {schema[n]}, not {types[n]}" for n in types if n in schema and schema[n] != types[n]]:
            return f"{uri}: column {'; '.join(wrong)}. {remedy}"
    return f"{source.uris[0]} cannot be read ({error}). {remedy}"


def _rows_of(uri: str) -> int:
    with storage.open_input(uri) as file:
        return pq.ParquetFile(file).metadata.num_rows
