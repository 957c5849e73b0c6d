"""Datasets for the feature store's tests: small `rows` artifacts as step `validate_source` makes them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from step_scripts.feature_store.commits import Commit, as_utc
from step_scripts.feature_store.events import Source, event_types, file_types, read_source, row_types
from step_scripts.feature_store.ingestion import Ingestion
from step_scripts.feature_store.offline_store import OfflineStore
from step_scripts.parameters import IngestFeaturesParams, IngestionTarget
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, StepContext, StepRequest, file_info
from step_scripts.table.column_types import polars_schema
from step_scripts.table.hashes import ids_of_hashes, row_hashes
from step_scripts.table.spec import ColumnSpec, TableSpec

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
TABLE = TableSpec(
    name="sales",
    columns=(
        ColumnSpec(name="PRICE", dtype="float64"),
        ColumnSpec(name="ROOMS", dtype="int64", nullable=True),
        ColumnSpec(name="SOLD", dtype="bool"),
    ),
    target="PRICE",
)
Row = tuple[str, datetime, float, int | None, bool]


def record_ids(frame: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """Ids of the rows over `columns`."""
    return ids_of_hashes(row_hashes(frame, columns))


def record_id(number: int) -> str:
    """A record id in the form that rows have: 32 hexadecimal digits."""
    return uuid.uuid5(uuid.NAMESPACE_OID, str(number)).hex


def row(number: int, price: float = 1.0, *, hours: float = 0, rooms: int | None = 3, sold: bool = True) -> Row:
    """One row; its event time is noon of a day plus `hours`."""
    return record_id(number), NOON + timedelta(hours=hours), price, rooms, sold


class Log(logging.Logger):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__("log")
        self.messages: list[str] = []

    def handle(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What an ingestion has changed: counts of rows, its commit, and the files that it has added."""

    rows_in: int
    rows_readable: int
    added: int
    unchanged: int
    superseded: int
    deleted: int
    outdated: int
    commit: Commit
    stored: tuple[FileInfo, ...]
    orphan_files_deleted: int
    already_ingested: bool
    written_online: int = 0


def write_frame(folder: Path, frame: pl.DataFrame, *, parts: int = 1, digest: str | None = None) -> Artifact:
    """An artifact of `frame`, in a new folder below `folder`."""
    target = folder / uuid.uuid4().hex
    target.mkdir(parents=True)
    files = []
    size = -(-frame.height // parts) or 1
    for number, at in enumerate(range(0, max(frame.height, 1), size)):
        path = target / f"part-{number:05d}.parquet"
        part = frame[at : at + size]
        part.write_parquet(path)
        files.append(file_info(str(path), str(target), part.height))
    return Artifact.of(str(target), files, digest=digest)


def rows_frame(rows: Sequence[Row], table: TableSpec = TABLE) -> pl.DataFrame:
    """Rows with the columns of the artifact."""
    types = {"record_id": pl.String(), "event_time": pl.Datetime("us", "UTC")} | polars_schema(table)
    return pl.DataFrame(rows, schema=types, orient="row")


def write_rows(folder: Path, rows: Sequence[Row], *, parts: int = 1, digest: str | None = None) -> Artifact:
    """An artifact of rows."""
    return write_frame(folder, rows_frame(rows), parts=parts, digest=digest)


def run_here(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Run the calls one after the other in this process."""
    for index, call in enumerate(calls):
        yield index, function(*call)


def prepared_ingestion(
    store: OfflineStore,
    dataset: Artifact,
    *,
    group: str = "sales",
    table: TableSpec = TABLE,
    run: Callable[..., Iterator[tuple[int, Any]]] = run_here,
    log: Log | None = None,
    workers: int = 1,
    **target: Any,
) -> Ingestion:
    """An ingestion in this process. What the step writes beside the group is in a folder beside the dataset's."""
    params = IngestFeaturesParams(table=table, group=group, target=IngestionTarget(root=store.root, **target))
    return Ingestion(store.folder(group), step_context(f"{dataset.uri}.out", log, rows=dataset), params, run, workers)


def ingest_rows(store: OfflineStore, dataset: Artifact, *, group: str = "sales", **options: Any) -> Ingested:
    """Ingest in this process, with the options of `prepared_ingestion`, while nobody else changes the group."""
    place = store.folder(group)
    before = place.state().files if place.is_there() else []
    outcome = prepared_ingestion(store, dataset, group=group, **options).ingest()
    counts: dict[str, Any] = {name: int(value) for name, value in outcome.metrics.items()}
    return Ingested(
        **counts,
        outdated=outcome.details["outdated_rows"],
        already_ingested=outcome.details["already_ingested"],
        orphan_files_deleted=outcome.details["orphan_files_deleted"],
        commit=store.commits(group, outcome.details["commit"])[-1],
        stored=tuple(file for file in outcome.outputs["features"].files if file not in before),
    )


def step_context(folder: str, log: Log | None = None, **inputs: Artifact) -> StepContext:
    """What a step's function gets, for a step that writes to `folder`."""
    request = StepRequest(step="ingest_features", params={}, inputs=inputs, output_root=folder, code_version="1")
    return StepContext(request, storage.join(folder, "attempt"), log or Log())


def records(frame: pl.LazyFrame) -> dict[str, tuple[Any, ...]]:
    """Rows by record id; fails if an id occurs twice."""
    rows = frame.collect().rows()
    by_id = {r[0]: r[1:] for r in rows}
    assert len(by_id) == len(rows), "a record was read twice"
    return by_id


def latest_events(events: pl.LazyFrame, as_of: datetime | None = None) -> pl.LazyFrame:
    """The latest event of each record up to `as_of`, without deleted records."""
    if as_of is not None:
        events = events.filter(pl.col("event_time") <= as_utc(as_of))
    latest = events.sort("event_time", "api_invocation_time", "write_time").unique("record_id", keep="last")
    return latest.filter(~pl.col("is_deleted"))


def scan(store: OfflineStore, *, as_of: datetime | None = None, commit: int | None = None) -> pl.LazyFrame:
    """Records of group `sales` at a point in time, from all its files: record_id, event_time, the table's columns."""
    state = store.state("sales", commit)
    table, iceberg = state.commits[-1].table, state.iceberg
    assert iceberg is not None
    uris = tuple(storage.join(state.data_uri, file.path) for file in state.files)
    rows, types = sum(file.rows or 0 for file in state.files), file_types(iceberg.schema().as_arrow())
    events = read_source(Source(0, uris, rows, types), list(event_types(table)), table)
    return latest_events(events.lazy(), as_of).select(*row_types(table))
