"""Iceberg through pyiceberg: catalogs, tables, files of a snapshot, and what is written in one commit.

Locally the catalog is an SQLite file in the group's own folder, so that a group is removed, moved and restored as a
whole; on SageMaker it is Glue.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyarrow.fs import AwsStandardS3RetryStrategy
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO, parquet_files_to_data_files
from pyiceberg.manifest import DataFile, ManifestEntry
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.table import Table, Transaction
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.transforms import DayTransform

from step_scripts.feature_store.commits import in_order, is_append
from step_scripts.feature_store.event_schema import iceberg_schema
from step_scripts.runner import storage
from step_scripts.table.spec import TableSpec

CATALOG = "housing"
NAMESPACE = "feature_store"
DATABASE = "catalog.db"
# Of a table of ours; of every table that is loaded, in memory only: SageMaker's own properties stay.
_WRITING = {
    # Texts are cut to 16 characters in statistics unless it is said otherwise.
    **{f"write.metadata.metrics.column.{name}": "full" for name in ("record_id", "event_time")},
    "commit.manifest-merge.enabled": "true",
}
_PROPERTIES = {
    **_WRITING,
    "commit.manifest.min-count-to-merge": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}
# A writer that was overtaken has to compare again, not to append the same files.
_NO_RETRIES = {"commit.retry.num-retries": "0"}


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


class S3Retries(AwsStandardS3RetryStrategy):
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
        "s3.retry-strategy-impl": f"{__name__}.{S3Retries.__name__}",
    }
    given = {name: value for name, value in options.items() if value is not None}
    return GlueCatalog(CATALOG, client=service_client("glue"), **given)


def metadata_location(folder: Path, database: str = DATABASE) -> str | None:
    """Where the local catalog says that the table's metadata are; None if it knows no table."""
    uri = f"{(folder / database).absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            row = connection.execute("SELECT metadata_location FROM iceberg_tables").fetchone()
    except sqlite3.OperationalError:  # no catalog, or one whose writer was killed while it made it
        return None
    return row[0] if row else None


def load(catalog: Catalog, identifier: tuple[str, ...]) -> Table | None:
    """The table as it is now, for readers and for one attempt to write; None if there is none."""
    try:
        table = catalog.load_table(identifier)
    except NoSuchTableError:
        return None
    properties = {**table.metadata.properties, **_WRITING, **_NO_RETRIES}
    table.metadata = table.metadata.model_copy(update={"properties": properties})
    return table


def create(catalog: Catalog, identifier: tuple[str, ...], spec: TableSpec, location: str) -> None:
    """Make the table for events of `spec`, one partition a day of the event time."""
    catalog.create_namespace_if_not_exists(identifier[:-1])
    schema = iceberg_schema(spec)
    event_time = schema.find_field("event_time").field_id
    days = PartitionSpec(PartitionField(event_time, 1000, DayTransform(), "event_time_day"))
    catalog.create_table(identifier, schema, location=location, partition_spec=days, properties=_PROPERTIES)


def partition_name(table: Table) -> str:
    """Name of the field that tables are partitioned by: that of the folders of the data files."""
    fields = table.spec().fields
    return fields[0].name if fields else "event_time_day"


def entries(table: Table, snapshot: Snapshot) -> Iterator[ManifestEntry]:
    """The data files of a snapshot, with the ids of the snapshots that have added them."""
    for manifest in snapshot.manifests(table.io):
        yield from manifest.fetch_manifest_entry(table.io, discard_deleted=True)


def data_uris(table: Table) -> set[str]:
    """URIs of all data files that any snapshot has."""
    ordered = in_order(table)
    # What a snapshot has, the next one has, too, if it only appends.
    largest = [snapshot for snapshot, after in pairwise(ordered) if not is_append(after)] + ordered[-1:]
    return {entry.data_file.file_path for snapshot in largest for entry in entries(table, snapshot)}


def referenced_uris(table: Table) -> set[str]:
    """URIs of all files that the table's metadata name, whatever the snapshot: data and metadata."""
    found = {table.metadata_location, *(entry.metadata_file for entry in table.metadata.metadata_log)}
    for snapshot in table.metadata.snapshots:
        found.add(snapshot.manifest_list)
        found.update(manifest.manifest_path for manifest in snapshot.manifests(table.io))
    return found | data_uris(table)


def commit(
    table: Table,
    transaction: Transaction,
    added: Iterable[str],
    summary: Mapping[str, str],
    removed: Iterable[DataFile] = (),
) -> int:
    """Commit the Parquet files at URIs `added`, and what the transaction holds already, as one snapshot; its id.

    With `removed`, the added files hold the rows that those have held. Reads footers. Raises pyiceberg's
    `CommitFailedException` if the table has changed since the transaction began.
    """
    described = list(parquet_files_to_data_files(table.io, transaction.table_metadata, iter(added)))
    gone = list(removed)
    update = transaction.update_snapshot(snapshot_properties=dict(summary))
    with update.overwrite() if gone else update.merge_append() as snapshot:
        for file in gone:
            snapshot.delete_data_file(file)
        for file in described:
            snapshot.append_data_file(file)
    transaction.commit_transaction()
    current = table.current_snapshot()
    assert current is not None
    return current.snapshot_id
