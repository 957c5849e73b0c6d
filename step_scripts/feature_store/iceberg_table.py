"""Iceberg through pyiceberg: the catalog of a group, its table, the files of a snapshot, what is written in one commit.

Only this module and its users in this package know pyiceberg. Locally the catalog is an SQLite file in the group's own
folder, so that a group is removed, moved and restored as a whole; on SageMaker it is Glue.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache
from pyarrow.fs import AwsStandardS3RetryStrategy
from pyiceberg.catalog import Catalog
from pyiceberg.conversions import from_bytes
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.io.pyarrow import (
    PyArrowFile,
    PyArrowFileIO,
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
    schema_to_pyarrow,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat, ManifestFile
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.transforms import DayTransform
from pyiceberg.types import (
    BooleanType,
    DoubleType,
    IcebergType,
    LongType,
    NestedField,
    PrimitiveType,
    StringType,
    TimestamptzType,
)

from step_scripts.runner import storage
from step_scripts.table.spec import DType, TableSpec

CATALOG = "housing"
NAMESPACE = "feature_store"
DATABASE = "catalog.db"
_TYPES: dict[DType, PrimitiveType] = {
    "int64": LongType(),
    "float64": DoubleType(),
    "bool": BooleanType(),
    "string": StringType(),
    "datetime": TimestamptzType(),
}
# Texts are cut to 16 characters in statistics unless it is said otherwise.
_STATISTICS = {f"write.metadata.metrics.column.{name}": "full" for name in ("record_id", "event_time")}
_PROPERTIES = {
    **_STATISTICS,
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}
_MANIFESTS: LRUCache[tuple[str, int], list[tuple[DataFile, int | None]]] = LRUCache(maxsize=200)
_MANIFESTS_LOCK = threading.Lock()
# A writer that was overtaken has to compare again, not to append the same files.
_OF_WRITERS = {"commit.retry.num-retries": "0"}


class _SyncedFile(PyArrowFile):
    """A local file that survives a power cut once it is closed."""

    def create(self, overwrite: bool = False) -> Any:
        return _SyncedStream(super().create(overwrite), Path(self._path))


class _SyncedStream:
    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _SyncedStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()
        storage.sync(str(self._path.parent), [self._path.name])


class LocalFileIO(PyArrowFileIO):
    """Local files, written for good."""

    def new_output(self, location: str) -> PyArrowFile:
        """See `FileIO`."""
        scheme, netloc, path = self.parse_location(location, self.properties)
        return _SyncedFile(fs=self.fs_by_scheme(scheme, netloc), location=location, path=path)


class PatientRetries(AwsStandardS3RetryStrategy):
    """As `step_scripts.runner.storage` has it."""

    def __init__(self) -> None:
        super().__init__(max_attempts=10)


def local_catalog(folder: Path, database: str = DATABASE) -> Catalog:
    """The catalog in a group's folder; made if it is not there."""
    from pyiceberg.catalog.sql import SqlCatalog

    return SqlCatalog(
        CATALOG,
        uri=f"sqlite:///{folder / database}",
        warehouse=f"file://{folder}",
        **{"py-io-impl": f"{__name__}.{LocalFileIO.__name__}"},
    )


def glue_catalog() -> Catalog:
    """Glue of this process's account and region. `AWS_ENDPOINT_URL` redirects it, and S3, to another server."""
    from pyiceberg.catalog.glue import GlueCatalog

    from step_scripts.runner.s3_objects import region, service_client

    options = {
        "s3.endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "s3.region": region(),
        "s3.connect-timeout": "10",
        "s3.request-timeout": "60",
        "s3.retry-strategy-impl": f"{__name__}.{PatientRetries.__name__}",
    }
    given = {name: value for name, value in options.items() if value is not None}
    return GlueCatalog(CATALOG, client=service_client("glue"), **given)


def metadata_place(folder: Path, name: str = DATABASE) -> str | None:
    """Where the local catalog says that the table's metadata are; None if it knows no table."""
    uri = f"{(folder / name).absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            row = database.execute("SELECT metadata_location FROM iceberg_tables").fetchone()
    except sqlite3.OperationalError:  # no catalog, or one whose writer was killed while it made it
        return None
    return row[0] if row else None


def load(catalog: Catalog, identifier: tuple[str, ...]) -> Table | None:
    """The table as it is now, for readers and for one attempt to write; None if there is none."""
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        return None
    properties = {**table.metadata.properties, **_OF_WRITERS, "commit.manifest-merge.enabled": "true"}
    table.metadata = table.metadata.model_copy(update={"properties": properties})  # in memory only
    return table


def create(catalog: Catalog, identifier: tuple[str, ...], spec: TableSpec, location: str) -> None:
    """Make the table for events of `spec`, one partition a day of the event time."""
    catalog.create_namespace_if_not_exists(identifier[:-1])
    schema = schema_of(spec)
    event_time = schema.find_field("event_time").field_id
    days = PartitionSpec(PartitionField(event_time, 1000, DayTransform(), "event_time_day"))
    catalog.create_table(identifier, schema, location=location, partition_spec=days, properties=_PROPERTIES)


def schema_of(spec: TableSpec) -> Schema:
    """Columns of the events of a table."""
    kinds: list[tuple[str, PrimitiveType, str]] = [
        ("record_id", StringType(), ""),
        ("event_time", TimestamptzType(), "when the row became true"),
        *((column.name, _TYPES[column.dtype], column.description) for column in spec.columns),
        ("write_time", TimestamptzType(), "when it was stored"),
        ("api_invocation_time", TimestamptzType(), "when it was stored"),
        ("is_deleted", BooleanType(), "whether the record does not exist from its event time on"),
    ]
    return Schema(
        *(
            NestedField(number, name, kind, required=False, doc=doc or None)
            for number, (name, kind, doc) in enumerate(kinds, 1)
        )
    )


def lacking(schema: Schema, spec: TableSpec) -> Schema:
    """Columns of `spec` that a table of this schema lacks; in the table's own type for such columns."""
    text_times = isinstance(schema.find_field("event_time").field_type, StringType)
    present = set(schema.column_names)
    fields = [field for field in schema_of(spec).fields if field.name not in present]

    def own_type(kind: IcebergType) -> IcebergType:
        if text_times and isinstance(kind, TimestamptzType):
            return StringType()
        return LongType() if text_times and isinstance(kind, BooleanType) else kind

    return Schema(*(field.model_copy(update={"field_type": own_type(field.field_type)}) for field in fields))


def file_schema(schema: Schema) -> pa.Schema:
    """Columns of a data file, with their field ids."""
    return schema_to_pyarrow(schema)


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a data file. The times are None where it has no statistics of them."""

    uri: str
    rows: int
    bytes: int
    first_time: Any
    last_time: Any
    snapshot_id: int | None


def files_of(table: Table, snapshot: Snapshot) -> list[FileFacts]:
    """The data files of a snapshot, in order of path."""
    time = table.schema().find_field("event_time")
    kind = cast(PrimitiveType, time.field_type)

    def bound(bounds: Mapping[int, bytes] | None) -> Any:
        return from_bytes(kind, bounds[time.field_id]) if bounds and time.field_id in bounds else None

    found = [
        FileFacts(
            uri=file.file_path,
            rows=file.record_count,
            bytes=file.file_size_in_bytes,
            first_time=bound(file.lower_bounds),
            last_time=bound(file.upper_bounds),
            snapshot_id=added_by,
        )
        for manifest in snapshot.manifests(table.io)
        for file, added_by in _entries(table, manifest)
    ]
    return sorted(found, key=lambda f: f.uri)


def data_files(table: Table, snapshot: Snapshot) -> Iterator[DataFile]:
    """The same as pyiceberg has them."""
    for manifest in snapshot.manifests(table.io):
        for file, _ in _entries(table, manifest):
            yield file


def data_uris(table: Table) -> set[str]:
    """URIs of all data files that any snapshot has."""
    ordered = sorted(table.metadata.snapshots, key=lambda s: s.sequence_number or 0)
    # What a snapshot has, the next one has, too, if it only adds.
    largest = [s for s, after in pairwise(ordered) if not _appends(after)] + ordered[-1:]
    return {file.file_path for snapshot in largest for file in data_files(table, snapshot)}


def referenced(table: Table) -> set[str]:
    """URIs of all files that the table's metadata name, whatever the snapshot: data and metadata."""
    found = {table.metadata_location, *(entry.metadata_file for entry in table.metadata.metadata_log)}
    for snapshot in table.metadata.snapshots:
        found.add(snapshot.manifest_list)
        found.update(manifest.manifest_path for manifest in snapshot.manifests(table.io))
    return found | data_uris(table)


def _appends(snapshot: Snapshot) -> bool:
    return snapshot.summary is not None and snapshot.summary.operation.value == "append"


def _entries(table: Table, manifest: ManifestFile) -> list[tuple[DataFile, int | None]]:
    """Data files of a manifest, which never changes, and the snapshots that have added them."""
    key = (manifest.manifest_path, manifest.manifest_length)
    with _MANIFESTS_LOCK:
        found = _MANIFESTS.get(key)
    if found is None:
        entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
        found = [(entry.data_file, entry.snapshot_id or manifest.added_snapshot_id) for entry in entries]
        with _MANIFESTS_LOCK:
            _MANIFESTS[key] = found
    return found


def described(schema: Schema, spec: PartitionSpec, uri: str, path: str, size: int) -> DataFile:
    """A Parquet file at `path`, which the table calls `uri`, with the statistics of its footer."""
    with storage.open_input(path) as file:
        footer = pq.read_metadata(file)
    statistics = data_file_statistics_from_parquet_metadata(
        footer,
        stats_columns=compute_statistics_plan(schema, _STATISTICS),
        parquet_column_mapping=parquet_path_to_id_mapping(schema),
    )
    return DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=uri,
        file_format=FileFormat.PARQUET,
        partition=statistics.partition(spec, schema),
        file_size_in_bytes=size,
        sort_order_id=None,
        spec_id=spec.spec_id,
        equality_ids=None,
        key_metadata=None,
        **statistics.to_serialized_dict(),
    )


def own_snapshots(table: Table, key: str) -> list[Snapshot]:
    """Snapshots whose summary has `key`, in order."""
    ordered = sorted(table.metadata.snapshots, key=lambda s: s.sequence_number or 0)
    return [s for s in ordered if s.summary is not None and s.summary.additional_properties.get(key) is not None]


def foreign_appends(table: Table, key: str) -> set[int]:
    """Ids of snapshots that other programs have made, whose rows are no part of the group."""
    own = {s.snapshot_id for s in own_snapshots(table, key)}
    return {
        s.snapshot_id
        for s in table.metadata.snapshots
        if s.snapshot_id not in own and s.summary is not None and s.summary.operation.value != "replace"
    }


def summary_of(snapshot: Snapshot) -> Mapping[str, str]:
    """The properties in a snapshot's summary."""
    return snapshot.summary.additional_properties if snapshot.summary is not None else {}


def partition_name(table: Table) -> str:
    """Name of the field that tables are partitioned by: that of the folders of the data files."""
    fields = table.spec().fields
    return fields[0].name if fields else "event_time_day"


def micros(bound: Any) -> int | None:
    """A bound of the event time in microseconds since 1970; None if there is none, or a text that is no time."""
    if bound is None or isinstance(bound, int):
        return bound
    try:
        moment = datetime.fromisoformat(bound)
    except ValueError:
        return None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def append(table: Table, transaction: Any, files: Iterable[DataFile], summary: Mapping[str, str]) -> int:
    """Commit `files` as one snapshot, with what the transaction holds already. Returns the snapshot's id.

    Raises pyiceberg's `CommitFailedException` if the table has changed since the transaction began.
    """
    with transaction.update_snapshot(snapshot_properties=dict(summary)).merge_append() as snapshot:
        for file in files:
            snapshot.append_data_file(file)
    transaction.commit_transaction()
    current = table.current_snapshot()
    assert current is not None
    return current.snapshot_id


def replace_files(
    table: Table, removed: Sequence[DataFile], added: Iterable[DataFile], summary: Mapping[str, str]
) -> None:
    """Commit that `added` hold the rows that `removed` have held."""
    transaction = table.transaction()
    with transaction.update_snapshot(snapshot_properties=dict(summary)).overwrite() as snapshot:
        for file in removed:
            snapshot.delete_data_file(file)
        for file in added:
            snapshot.append_data_file(file)
    transaction.commit_transaction()
