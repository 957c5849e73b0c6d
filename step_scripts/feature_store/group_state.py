"""A group at one moment: its commits, and the data files that its Iceberg table has then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import cast

from pyiceberg.conversions import from_bytes
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.types import NestedField, PrimitiveType

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import Commit, foreign_appends
from step_scripts.runner.contract import StepError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class StoredFile:
    """One Parquet file of events, sorted by record id. `path` is relative to the group's `data` folder."""

    path: str
    rows: int
    bytes: int
    first_event_time: datetime
    last_event_time: datetime

    @classmethod
    def of(cls, file: DataFile, event_time: NestedField, data_uri: str) -> StoredFile:
        """What a manifest says of a file. Without statistics of the event time it may have any."""

        def bound(bounds: dict[int, bytes] | None, otherwise: datetime) -> datetime:
            if not bounds or event_time.field_id not in bounds:
                return otherwise.replace(tzinfo=UTC)
            found = from_bytes(cast(PrimitiveType, event_time.field_type), bounds[event_time.field_id])
            if isinstance(found, int):
                return _EPOCH + timedelta(microseconds=found)
            try:
                moment = datetime.fromisoformat(str(found))
            except ValueError:  # another program's text
                return otherwise.replace(tzinfo=UTC)
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment

        return cls(
            path=path_in(file.file_path, data_uri),
            rows=file.record_count,
            bytes=file.file_size_in_bytes,
            first_event_time=bound(file.lower_bounds, datetime.min),
            last_event_time=bound(file.upper_bounds, datetime.max),
        )

    @property
    def sha256(self) -> str:
        """Of its content, as its name says."""
        return self.path.rpartition("-")[2].removesuffix(".parquet")


def path_in(uri: str, folder: str) -> str:
    """`uri`, which pyiceberg has written as a URL, relative to a folder that it is in."""
    plain = uri.removeprefix("file://").replace("s3a://", "s3://", 1)
    return plain.removeprefix(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class GroupState:
    """The group at one moment: its commits in order, and its table."""

    commits: list[Commit]
    data_uri: str
    iceberg: Table | None

    @property
    def last(self) -> Commit | None:
        """The latest commit."""
        return self.commits[-1] if self.commits else None

    def snapshot(self, number: int) -> Snapshot:
        """The snapshot of a commit. Raises `StepError` if it has been expired."""
        found = self.commits[number - 1].snapshot_id
        snapshot = self.iceberg.snapshot_by_id(found) if self.iceberg is not None and found is not None else None
        if snapshot is None:
            raise StepError(
                f"commit {number} has been expired: it was too old, and no kept model version or split named it. "
                "Materialize from the present state of the feature group"
            )
        return snapshot

    @cached_property
    def data_files(self) -> list[DataFile]:
        """Files that make up the group after the latest of these commits, in order of path."""
        if not self.commits:
            return []
        assert self.iceberg is not None
        foreign = foreign_appends(self.iceberg)
        with reading(self.iceberg.metadata_location):
            found = iceberg_table.entries(self.iceberg, self.snapshot(len(self.commits)))
            own = [entry.data_file for entry in found if entry.snapshot_id not in foreign]
        return sorted(own, key=lambda file: file.file_path)

    @cached_property
    def files(self) -> list[StoredFile]:
        """The same, described."""
        if not self.data_files:
            return []
        assert self.iceberg is not None
        event_time = self.iceberg.schema().find_field("event_time")
        return [StoredFile.of(file, event_time, self.data_uri) for file in self.data_files]


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
