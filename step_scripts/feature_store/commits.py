"""Commits: what one ingestion or deletion changed. Each is a snapshot of the group's Iceberg table.

What it changed is in the snapshot's summary. Of snapshots that have been expired it is in a file beside the table.
`GroupState` is the group at one moment: its commits, and the data files that its table has then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from pydantic import Field
from pyiceberg.conversions import from_bytes
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.types import NestedField
from pyiceberg.utils.datetime import micros_to_timestamptz

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.events import WriteTarget
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, FileInfo, FrozenModel, StepError
from step_scripts.runner.wording import counted
from step_scripts.table.hashes import add_sums, subtract_sums
from step_scripts.table.spec import TableSpec

FORMAT = 2
# Names in the summaries of snapshots.
_PREFIX = "housing."
COMMIT_KEY = f"{_PREFIX}commit"
INGESTION_KEY = f"{_PREFIX}ingestion"
REPLAYED_KEY = f"{_PREFIX}replayed-from"
COMPACTED_KEY = f"{_PREFIX}compaction"
STORED_COUNTS = ("added", "unchanged", "superseded", "deleted")
_SUMS = ("stored_sums", "live_added", "live_removed")
# Where statistics lack the event time, a file may have any.
_ANY_TIME = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Changes:
    """What a set of incoming events changes.

    Counts of rows as in `Commit`; `outdated`: rows that are not the record's latest state; `latest`: events to store
    that are their records' latest from then on. `live_rows`: how many live records there are more. Digests, two sums
    each, of the events to store and of the live events that come and go. `further_events`: how many events, stored or
    to be stored, are not the only ones of their records. `conflicts`: source and row of rows that contradict another
    row of the dataset (same record and event time, other content); if there are any, nothing else is filled in.
    """

    added: int = 0
    unchanged: int = 0
    superseded: int = 0
    deleted: int = 0
    outdated: int = 0
    latest: int = 0
    live_rows: int = 0
    stored_sums: tuple[int, int] = (0, 0)
    live_added: tuple[int, int] = (0, 0)
    live_removed: tuple[int, int] = (0, 0)
    further_events: int = 0
    conflicts: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Changes) -> Changes:
        """Both, of different records."""

        def total(name: str) -> Any:
            mine, others = getattr(self, name), getattr(other, name)
            return add_sums(mine, others) if name in _SUMS else mine + others

        return Changes(**{field.name: total(field.name) for field in fields(self)})


class Commit(FrozenModel):
    """What one ingestion or deletion changed, and the state of the group after it.

    Rows of the dataset are either `added` (new records, and events older than what was known), `superseded` (the live
    event of a record was replaced) or `unchanged` (nothing stored). `deleted` counts tombstones.
    """

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


def is_ingested(commits: Sequence[Commit], dataset_digest: str, *, mirror: bool) -> bool:
    """Whether to ingest a dataset again would change nothing.

    With `mirror`, only the last commit may have ingested it and left no other records; else later ones may have added
    some.
    """
    for commit in reversed(commits):
        if commit.dataset_digest == dataset_digest:
            return commit.mirrors or not mirror
        if mirror or commit.superseded or commit.deleted:
            return False
    return False


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
        with iceberg_table.reading(table.metadata_location):
            entries = iceberg_table.entries(table, snapshot)
        return sorted((e.data_file for e in entries if e.snapshot_id not in foreign), key=lambda file: file.file_path)

    @cached_property
    def files(self) -> list[FileInfo]:
        """The same, by their paths below the `data` folder. A name ends with the SHA-256 of the content."""
        found = []
        for file in self.data_files:
            path = iceberg_table.path_in(file.file_path, self.data_uri)
            sha256 = path.rpartition("-")[2].removesuffix(".parquet")
            found.append(FileInfo(path=path, rows=file.record_count, bytes=file.file_size_in_bytes, sha256=sha256))
        return found

    @cached_property
    def event_times(self) -> list[tuple[datetime, datetime]]:
        """The first and the last event time of each of the files, by the statistics in the manifests."""
        if not self.data_files:
            return []
        assert self.iceberg is not None
        column = self.iceberg.schema().find_field("event_time")
        first, last = _ANY_TIME
        return [
            (_bound(file.lower_bounds, column, first), _bound(file.upper_bounds, column, last))
            for file in self.data_files
        ]

    def lost_files(self) -> tuple[list[FileInfo], str]:
        """Committed files that are not there any more, or not in their size; and a sentence that names the first."""
        sizes = storage.sizes(self.data_uri, [f.path for f in self.files])
        lost = [f for f in self.files if sizes.get(f.path) != f.bytes]
        first = storage.join(self.data_uri, lost[0].path) if lost else ""
        of = counted(len(self.files), "file")
        return lost, f"{len(lost)} of {of} of feature group {self.name} missing or cut off, the first is {first}"

    def artifact(self, as_of: datetime | None = None) -> Artifact:
        """The files as an artifact whose URI is the `data` folder, and whose digest and rows are those of records.

        With `as_of`, without the files that have later events only: the digest is then that of time and files.
        """
        assert self.last is not None
        moment = as_utc(as_of) if as_of else _ANY_TIME[1]
        if all(last <= moment for _, last in self.event_times):
            found = Artifact.of(self.data_uri, self.files, digest=self.last.live_digest)
            return found.model_copy(update={"rows": self.last.live_rows})
        files = [file for file, (first, _) in zip(self.files, self.event_times, strict=True) if first <= moment]
        names = "\n".join([moment.isoformat(), *sorted(file.sha256 for file in files)])
        found = Artifact.of(self.data_uri, files, digest=hashlib.sha256(names.encode()).hexdigest())
        return found.model_copy(update={"rows": None})

    def after(
        self, changes: Changes, target: WriteTarget, *, dataset_digest: str | None = None, mirrors: bool = False
    ) -> Commit:
        """The next commit, which makes `changes`."""
        last = self.last
        live = add_sums(last.live_sums if last else (0, 0), changes.live_added)
        return Commit(
            number=len(self.commits) + 1,
            created_at=target.write_time,
            write_time=target.write_time,
            dataset_digest=dataset_digest,
            table=target.table,
            **{name: getattr(changes, name) for name in STORED_COUNTS},
            live_rows=(last.live_rows if last else 0) + changes.live_rows,
            live_digest=digest_of(subtract_sums(live, changes.live_removed)),
            mirrors=mirrors,
            deduplicate=changes.further_events > 0 or bool(last and last.deduplicate),
        )


def _bound(bounds: dict[int, bytes] | None, column: NestedField, otherwise: datetime) -> datetime:
    if (encoded := (bounds or {}).get(column.field_id)) is None:
        return otherwise
    kind: Any = column.field_type
    found = from_bytes(kind, encoded)
    if isinstance(found, int):
        return micros_to_timestamptz(found)
    try:
        return as_utc(datetime.fromisoformat(str(found)))
    except ValueError:  # another program's text
        return otherwise


def as_utc(time: datetime) -> datetime:
    """`time` in UTC; without a time zone it is taken to be in UTC."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
