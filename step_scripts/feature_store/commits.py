"""Commits: what one ingestion or deletion changed. Each is a snapshot of the group's Iceberg table.

What it changed is in the snapshot's summary. Of snapshots that have been expired it is in a file beside the table.
`GroupState` is the group at one moment: its commits, and the data files that its table has then.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pyiceberg.conversions import from_bytes
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.types import NestedField

from step_scripts.feature_store import iceberg_table
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

FORMAT = 2
# Names in the summaries of snapshots.
_PREFIX = "housing."
COMMIT_KEY = f"{_PREFIX}commit"
INGESTION_KEY = f"{_PREFIX}ingestion"
REPLAYED_KEY = f"{_PREFIX}replayed-from"
COMPACTED_KEY = f"{_PREFIX}compaction"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class GroupInfo(BaseModel):
    """What is known of a group from its creation on. `data_uri`: where its data are, if not in its own folder.

    `glue_table`: database and name of its table in Glue, with a dot between them; on S3 only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    name: str
    table: TableSpec
    created_at: datetime
    data_uri: str | None = None
    glue_table: str | None = None


class Commit(BaseModel):
    """What one ingestion or deletion changed, and the state of the group after it.

    Rows of the dataset are either `added` (new records, and events older than what was known), `superseded` (the live
    event of a record was replaced) or `unchanged` (nothing stored). `deleted` counts tombstones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=1)
    created_at: datetime
    write_time: datetime = Field(description="`write_time` of all its events; later than that of every earlier commit.")
    dataset_digest: str | None = Field(default=None, description="Of the ingested artifact. None: a single deletion.")
    table: TableSpec = Field(description="The group's columns from this commit on.")
    added: int = 0
    unchanged: int = 0
    superseded: int = 0
    deleted: int = 0
    live_rows: int = Field(description="Records that a read without `as_of` returns.")
    live_digest: str = Field(description="Digest of the live records; does not depend on their order.")
    mirrors: bool = Field(description="Whether the live records are those of the dataset, and no others.")
    deduplicate: bool = Field(description="Whether a record may have several events, or a tombstone.")
    snapshot_id: int | None = Field(default=None, description="Of the Iceberg table. None: expired, or not made yet.")

    @property
    def live_sums(self) -> tuple[int, int]:
        """The two sums that the digest is made of."""
        return int(self.live_digest[:16], 16), int(self.live_digest[16:], 16)

    def summary(self, before: TableSpec | None) -> dict[str, str]:
        """As it stands in the summary of its snapshot. The table only if it is not that of `before`."""
        facts = self.model_dump(mode="json", exclude={"table", "number", "snapshot_id"}, exclude_none=True)
        found = {_key(name): value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
        if self.table != before:
            found[_key("table")] = self.table.model_dump_json(exclude_defaults=True)
        return {COMMIT_KEY: str(self.number), f"{_PREFIX}format": str(FORMAT), **found}

    @classmethod
    def of(cls, snapshot: Snapshot, before: TableSpec | None) -> Commit:
        """The commit that a snapshot's summary describes. Raises `ValueError` if something is missing."""
        summary = summary_of(snapshot)
        facts: dict[str, object] = {name: summary[_key(name)] for name in cls.model_fields if _key(name) in summary}
        if _key("table") in summary:
            before = TableSpec.model_validate_json(summary[_key("table")])
        return cls.model_validate({**facts, "table": before, "snapshot_id": snapshot.snapshot_id})


def _key(name: str) -> str:
    return COMMIT_KEY if name == "number" else f"{_PREFIX}{name.replace('_', '-')}"


def digest_of(sums: Sequence[int]) -> str:
    """32 hexadecimal digits of two 64-bit sums."""
    return "{:016x}{:016x}".format(*sums)


def summary_of(snapshot: Snapshot) -> Mapping[str, str]:
    """The properties in a snapshot's summary."""
    return snapshot.summary.additional_properties if snapshot.summary is not None else {}


def number_of(snapshot: Snapshot) -> int:
    """The number of the commit that a snapshot of this store belongs to."""
    return int(summary_of(snapshot)[COMMIT_KEY])


def own_snapshots(table: Table) -> list[Snapshot]:
    """Snapshots that this store has made, oldest first."""
    own = [snapshot for snapshot in table.metadata.snapshots if COMMIT_KEY in summary_of(snapshot)]
    return sorted(own, key=lambda snapshot: snapshot.sequence_number or 0)


def history(table: Table, expired: Sequence[Commit]) -> dict[int, Commit]:
    """All commits by number: those `expired`, and those whose snapshots are there."""
    found = {commit.number: commit for commit in expired}
    spec = None
    for snapshot in own_snapshots(table):
        before = found.get(number_of(snapshot) - 1)
        commit = Commit.of(snapshot, before.table if before else spec)
        found[commit.number], spec = commit, commit.table
    return dict(sorted(found.items()))


def ingested_by(commits: Sequence[Commit], dataset_digest: str, *, mirror: bool) -> Commit | None:
    """The commit that ingested a dataset, if to ingest it again would change nothing.

    With `mirror`, only if it is the last one and left no other records; otherwise later commits may have added some.
    """
    if mirror:
        last = commits[-1] if commits else None
        return last if last and last.mirrors and last.dataset_digest == dataset_digest else None
    for commit in reversed(commits):
        if commit.dataset_digest == dataset_digest:
            return commit
        if commit.superseded or commit.deleted:
            return None
    return None


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
            encoded = (bounds or {}).get(event_time.field_id)
            kind: Any = event_time.field_type
            found = otherwise if encoded is None else from_bytes(kind, encoded)
            if isinstance(found, int):
                return _EPOCH + timedelta(microseconds=found)
            with contextlib.suppress(ValueError):  # another program's text
                otherwise = datetime.fromisoformat(str(found))
            return otherwise if otherwise.tzinfo else otherwise.replace(tzinfo=UTC)

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


def path_in(uri: str, folder: str = "") -> str:
    """`uri`, which pyiceberg has written as a URL, relative to a folder that it is in."""
    plain = uri.removeprefix("file://").replace("s3a://", "s3://", 1)
    return plain.removeprefix(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class GroupState:
    """The group at one moment: its commits in order, and its table."""

    name: str
    data_uri: str
    commits: list[Commit]
    iceberg: Table | None

    @property
    def last(self) -> Commit | None:
        """The latest commit."""
        return self.commits[-1] if self.commits else None

    @cached_property
    def data_files(self) -> list[DataFile]:
        """Files that make up the group after the latest of these commits, in order of path.

        Without those that other programs have added; their compactions add no rows. Raises `StepError` if the commit
        has been expired.
        """
        if self.last is None:
            return []
        table, snapshot_id = self.iceberg, self.last.snapshot_id
        snapshot = table.snapshot_by_id(snapshot_id) if table is not None and snapshot_id is not None else None
        if table is None or snapshot is None:
            raise StepError(
                f"commit {self.last.number} has been expired: it was too old, and no kept model version or split named "
                "it. Materialize from the present state of the feature group"
            )
        foreign = {
            other.snapshot_id
            for other in table.metadata.snapshots
            if other.summary and COMMIT_KEY not in summary_of(other) and other.summary.operation.value != "replace"
        }
        with reading(table.metadata_location):
            entries = iceberg_table.entries(table, snapshot)
        return sorted((e.data_file for e in entries if e.snapshot_id not in foreign), key=lambda file: file.file_path)

    @cached_property
    def files(self) -> list[StoredFile]:
        """The same, described."""
        if not self.data_files:
            return []
        assert self.iceberg is not None
        event_time = self.iceberg.schema().find_field("event_time")
        return [StoredFile.of(file, event_time, self.data_uri) for file in self.data_files]

    def lost_files(self) -> tuple[list[StoredFile], str]:
        """Committed files that are not there any more, or not in their size; and a sentence that names the first."""
        sizes = storage.sizes(self.data_uri, [f.path for f in self.files])
        lost = [f for f in self.files if sizes.get(f.path) != f.bytes]
        first = storage.join(self.data_uri, lost[0].path) if lost else ""
        of = counted(len(self.files), "file")
        return lost, f"{len(lost)} of {of} of feature group {self.name} missing or cut off, the first is {first}"

    def artifact(self) -> Artifact:
        """The files as an artifact whose URI is the `data` folder, and whose digest and rows are those of records."""
        assert self.last is not None
        listed = [FileInfo(path=f.path, rows=f.rows, bytes=f.bytes, sha256=f.sha256) for f in self.files]
        found = Artifact.of(self.data_uri, listed, digest=self.last.live_digest)
        return found.model_copy(update={"rows": self.last.live_rows})


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
