"""Iceberg through pyiceberg: catalogs, tables, files of a snapshot, and what is written in one commit.

On SageMaker the catalog is Glue; a local group has its own, see `step_scripts.feature_store.group_places`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pyarrow.fs import AwsStandardS3RetryStrategy
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.io.pyarrow import PyArrowFile, PyArrowFileIO, parquet_files_to_data_files
from pyiceberg.manifest import DataFile, ManifestEntry
from pyiceberg.table import Table, Transaction
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.transforms import DayTransform
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from step_scripts.feature_store.events import table_columns
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import sync_files
from step_scripts.table.spec import TableSpec

CATALOG = "housing"
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
_COMMIT_ATTEMPTS = 12
_LONGEST_PAUSE = 10.0  # seconds
# A writer that was overtaken has to compare again, not to append the same files.
_NO_RETRIES = {"commit.retry.num-retries": "0"}

T = TypeVar("T")


class _SyncedStream(io.BufferedWriter):
    """A local file that survives a power cut once it is closed."""

    def close(self) -> None:
        if not self.closed:
            self.flush()
            os.fsync(self.fileno())
            super().close()
            sync_files(Path(self.name).parent)


class _SyncedFile(PyArrowFile):
    def create(self, overwrite: bool = False) -> Any:
        super().create(overwrite).close()  # makes folders, and refuses to overwrite
        return _SyncedStream(io.FileIO(self._path, "w"))


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


def glue_catalog() -> Catalog:
    """Glue of this process's account and region. `AWS_ENDPOINT_URL` redirects it, and S3, to another server."""
    from pyiceberg.catalog.glue import GlueCatalog

    from step_scripts.runner.storage import region, service_client

    options = {
        "s3.endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "s3.region": region(),
        "s3.connect-timeout": "10",
        "s3.request-timeout": "60",
        "s3.retry-strategy-impl": f"{__name__}.{S3Retries.__name__}",
    }
    given = {name: value for name, value in options.items() if value is not None}
    return GlueCatalog(CATALOG, client=service_client("glue"), **given)


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
    made: dict[str, Any] = {"location": location, "properties": _PROPERTIES}
    begun = catalog.create_table_transaction(identifier, table_columns(spec), **made)
    with begun as transaction, transaction.update_spec() as update:
        update.add_field("event_time", DayTransform(), "event_time_day")


def entries(table: Table, snapshot: Snapshot) -> list[ManifestEntry]:
    """The data files of a snapshot, with the ids of the snapshots that have added them."""
    return [entry for manifest in snapshot.manifests(table.io) for entry in manifest.fetch_manifest_entry(table.io)]


def files_named_by(table: Table) -> Iterator[str]:
    """URIs of all files that the table's metadata name: metadata, and the data files of all snapshots.

    Those of the latest snapshots come first, so that who has found what they look for need not read all manifests.
    """
    yield table.metadata_location
    yield from (entry.metadata_file for entry in table.metadata.metadata_log)
    seen = set[str]()
    for snapshot in sorted(table.metadata.snapshots, key=lambda s: s.sequence_number or 0, reverse=True):
        yield snapshot.manifest_list
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path not in seen:
                seen.add(manifest.manifest_path)
                yield manifest.manifest_path
                yield from (entry.data_file.file_path for entry in manifest.fetch_manifest_entry(table.io))


def commit(
    table: Table,
    transaction: Transaction,
    added: Iterable[str],
    summary: Mapping[str, str],
    removed: Iterable[DataFile] = (),
) -> Snapshot:
    """Commit the Parquet files at URIs `added`, and what the transaction holds already, as one snapshot.

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
    return current


def path_in(uri: str, folder: str = "") -> str:
    """`uri`, which pyiceberg has written as a URL, relative to a folder that it is in."""
    plain = uri.removeprefix("file://").replace("s3a://", "s3://", 1)
    return plain.removeprefix(folder.rstrip("/") + "/")


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
    """Turns what pyiceberg raises for lost or damaged metadata into a `StepError` that says so."""
    try:
        yield
    except StepError:
        raise
    except Exception as error:
        of_catalog = type(error).__module__.partition(".")[0] == "sqlalchemy"
        if not of_catalog and not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise StepError(
            f"the table of the feature group at {place} cannot be read ({type(error).__name__}: {error}); restore it "
            "from a backup, or delete the group and ingest its sources again"
        ) from error


class CommitTaken(StepError):
    """Another writer has committed first: what is to be written must be compared again."""


def retry_on_commit_conflict(write: Callable[[], T], log: Callable[[str], None]) -> T:
    """Repeat `write`, which begins by reading the group's state, while other writers commit first; logs each time.

    Raises `StepError` after 12 times: of writers that start together, one a round succeeds.
    """
    attempts = Retrying(
        retry=retry_if_exception_type(CommitTaken),
        stop=stop_after_attempt(_COMMIT_ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
        before_sleep=lambda state: log(f"{state.outcome.exception() if state.outcome else ''}: comparing again"),
        reraise=True,
    )
    try:
        return attempts(write)
    except CommitTaken as error:
        raise StepError(
            f"other writers have committed to the feature group first, {_COMMIT_ATTEMPTS} times in a row; nothing of "
            "this one was committed. Ingest again when fewer runs write to the group"
        ) from error
