"""The offline store: groups of records, each an Iceberg table of events, read at a point in time.

There is no second copy for look-ups: stored files are sorted by record id, so that one record is found by the
statistics in the files' footers. The online view cannot disagree with the offline one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl
from pyiceberg.expressions import AlwaysTrue, In
from pyiceberg.io.pyarrow import ArrowScan

from step_scripts.feature_store.commits import EMPTY_DIGEST, Commit, digest_of
from step_scripts.feature_store.data_files import events_digest, read_back, tombstones, write_events
from step_scripts.feature_store.event_schema import event_types, row_types, validate_columns, validate_schema_change
from step_scripts.feature_store.glue_group import GlueGroup
from step_scripts.feature_store.group import GROUP_NAME, Group, retry_on_commit_conflict
from step_scripts.feature_store.group_state import GroupState, StoredFile
from step_scripts.feature_store.ingestion import ingested_by
from step_scripts.feature_store.local_group import LocalGroup
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError
from step_scripts.runner.s3_objects import list_folders
from step_scripts.table.column_types import columns_as
from step_scripts.table.hashes import subtract_sums
from step_scripts.table.spec import TableSpec

_SAMPLED_FILES = 10
_EVENT_ORDER = ("event_time", "api_invocation_time", "write_time")


@dataclass(frozen=True)
class Snapshot:
    """Files that hold the records of a group at one point in time.

    `deduplicate`: a record may have several events or be deleted, so readers take the latest event of each. `as_of`:
    readers leave out later events. `commit`: number of the latest commit, `snapshot_id`: of its Iceberg snapshot.
    """

    artifact: Artifact
    deduplicate: bool
    commit: int
    snapshot_id: int | None
    as_of: datetime | None = None


def latest_events(events: pl.LazyFrame, as_of: datetime | None = None) -> pl.LazyFrame:
    """The latest event of each record up to `as_of`, without deleted records. Columns stay as they are."""
    if as_of is not None:
        events = events.filter(pl.col("event_time") <= as_utc(as_of))
    latest = events.sort(_EVENT_ORDER).unique("record_id", keep="last", maintain_order=False)
    return latest.filter(~pl.col("is_deleted"))


def as_utc(time: datetime) -> datetime:
    """`time` in UTC; without a time zone it is taken to be in UTC."""
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


class OfflineStore:
    """The groups below one folder or s3:// prefix.

    Methods raise `StepError` for a group that is not there or damaged.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def groups(self) -> list[str]:
        """Names of all groups."""
        if storage.is_remote(self.root):
            names = list_folders(self.root)
        else:
            root = storage.local_path(self.root)
            names = [p.name for p in root.iterdir()] if root.is_dir() else []
        return sorted(name for name in names if GROUP_NAME.fullmatch(name) and self.folder(name).is_there())

    def unfinished_removals(self) -> dict[str, str]:
        """What is left on S3 of groups whose removal has failed: places by name."""
        folders = [self.folder(name) for name in list_folders(self.root) if GROUP_NAME.fullmatch(name)]
        return {f.name: f.uri for f in folders if isinstance(f, GlueGroup) and f.removal_is_incomplete()}

    def folder(self, group: str, data_uri: str | None = None, glue_table: str | None = None) -> Group:
        """The group's place, there or not. On S3 only: where its data and its table are, if that is known already."""
        if storage.is_remote(self.root):
            return GlueGroup(self.root, group, data_uri, glue_table)
        return LocalGroup(self.root, group)

    def ensure_group(
        self, group: str, table: TableSpec, data_uri: str | None = None, glue_table: str | None = None
    ) -> None:
        """Create the group, or check that its schema accepts rows of `table`: `StepError` names what does not fit.

        On S3 only: `data_uri`, where its data are to be, if not in its own folder, and `glue_table`, the database and
        the table, with a dot between them, that SageMaker has made.
        """
        self.check_table(group, table)
        folder = self.folder(group, data_uri, glue_table)
        if folder.commits():
            return
        info = folder.info()
        wanted = {"table": table, "data_uri": data_uri, "glue_table": glue_table}
        if info is None or any(value not in (None, getattr(info, name)) for name, value in wanted.items()):
            with folder.lock(create=True):
                if not folder.commits():
                    folder.create(table, data_uri, glue_table)

    def check_table(self, group: str, table: TableSpec) -> None:
        """Raise `StepError` if the group is there and does not accept rows of `table`; it names what does not fit."""
        validate_columns(group, table)
        if commits := self.folder(group).commits():
            validate_schema_change(group, commits[-1].table, table)

    def commits(self, group: str, upto: int | None = None) -> list[Commit]:
        """The group's commits in order, all or up to a number."""
        return self._existing(group).commits(upto)

    def files(self, group: str, commit: int | None = None) -> list[StoredFile]:
        """Files that make up the group after `commit`, or now."""
        return self._existing(group).state(commit).files

    def table(self, group: str) -> TableSpec:
        """The group's columns."""
        folder = self._existing(group)
        if commits := folder.commits():
            return commits[-1].table
        info = folder.info()
        assert info is not None
        return info.table

    def scan(self, group: str, as_of: datetime | None = None, commit: int | None = None) -> pl.LazyFrame:
        """Records at a point in time: record_id, event_time and the table's columns, no order.

        `as_of`: the latest event of each record up to this time, inclusive. `commit`: as if later commits had not
        been made. Deleted records are left out. Holds all events in memory; steps read the files of `snapshot`.
        """
        folder = self._existing(group)
        state = folder.state(commit)
        table = state.last.table if state.last else self.table(group)
        return latest_events(_events(folder, state, table).lazy(), as_of).select(*row_types(table))

    def snapshot(self, group: str, as_of: datetime | None = None, commit: int | None = None) -> Snapshot:
        """The files to read for the records of now, or of `as_of`. Raises `StepError` if the group has no commit.

        `commit`: as if later commits had not been made.
        """
        folder = self._existing(group)
        state = folder.state(commit)
        if state.last is None:
            raise self._empty(group)
        return _snapshot(folder, state.last, state.files, as_of)

    def find_ingestion(self, group: str, dataset_digest: str, *, mirror: bool) -> Snapshot | None:
        """The group's snapshot if to ingest this dataset (again) would change nothing, and no file is missing."""
        folder = self.folder(group)
        if folder.info() is None:
            return None
        state = folder.state()
        if not ingested_by(state.commits, dataset_digest, mirror=mirror) or folder.lost_files(state.files)[0]:
            return None
        return _snapshot(folder, state.commits[-1], state.files)

    def get_record(self, group: str, record_id: str) -> dict[str, Any] | None:
        """The record's latest event (record_id, event_time, the table's columns); None if unknown or deleted."""
        folder = self._existing(group)
        state = folder.state()
        if state.last is None:
            return None
        table = state.last.table
        found = _events(folder, state, table, [record_id]).sort(_EVENT_ORDER).tail(1)
        live = found.filter(~pl.col("is_deleted")).select(*row_types(table))
        return live.row(0, named=True) if live.height else None

    def sample(self, group: str, count: int) -> pl.DataFrame:
        """The latest events of about `count` records, deletions among them: the first ids of up to ten files.

        Columns: record_id, event_time, the table's columns, is_deleted. Reads a row group or two of each file.
        """
        folder = self._existing(group)
        state = folder.state()
        if state.last is None:
            raise self._empty(group)
        table = state.last.table
        files = state.files[:: -(-len(state.files) // _SAMPLED_FILES)]
        ids = set[str]()
        for file in files:
            with storage.open_input(storage.join(folder.data_uri, file.path)) as opened:
                ids.update(pl.read_parquet(opened, columns=["record_id"], n_rows=-(-count // len(files)))["record_id"])
        latest = _events(folder, state, table, ids).sort(_EVENT_ORDER).unique("record_id", keep="last")
        return latest.select(*row_types(table), "is_deleted")

    def delete_record(self, group: str, record_id: str, event_time: datetime) -> bool:
        """Store that the record does not exist from `event_time` on. False, and nothing stored, if it did not then."""
        folder = self._existing(group)
        with folder.lock():
            return retry_on_commit_conflict(lambda: _delete_record(folder, record_id, as_utc(event_time)), logging.info)

    def delete_group(self, group: str) -> None:
        """Remove the group and all its records. Waits for a writer to finish."""
        folder = self.folder(group)
        if not folder.is_there():
            raise self._absent(group)
        with folder.lock():
            folder.remove()

    def describe(self, group: str) -> dict[str, Any]:
        """Facts about the group, as plain data: schema, size, span of event times, commits."""
        folder = self._existing(group)
        info, state = folder.info(), folder.state()
        files, last = state.files, state.last
        assert info is not None
        return {
            "name": group,
            "path": folder.uri,
            "data": folder.data_uri,
            "created_at": info.created_at.isoformat(),
            "columns": {c.name: c.dtype for c in (last.table if last else info.table).columns},
            "commits": len(state.commits),
            "snapshot_id": last.snapshot_id if last else None,
            "last_commit_at": last.created_at.isoformat() if last else None,
            "live_rows": last.live_rows if last else 0,
            "live_digest": last.live_digest if last else EMPTY_DIGEST,
            "events": sum(f.rows for f in files),
            "deduplicate": last.deduplicate if last else False,
            "files": len(files),
            "bytes": sum(f.bytes for f in files),
            "first_event_time": min(f.first_event_time for f in files).isoformat() if files else None,
            "last_event_time": max(f.last_event_time for f in files).isoformat() if files else None,
        }

    def _existing(self, group: str) -> Group:
        folder = self.folder(group)
        if folder.info() is None:
            raise self._absent(group)
        return folder

    def _absent(self, group: str) -> StepError:
        return StepError(f"there is no feature group {group} in {self.root}; it has {self.groups() or 'none'}")

    def _empty(self, group: str) -> StepError:
        return StepError(f"nothing has been ingested into feature group {group} yet")


def _snapshot(folder: Group, last: Commit, files: list[StoredFile], as_of: datetime | None = None) -> Snapshot:
    """The files of a group after its commit `last`, as a snapshot."""
    moment = as_utc(as_of) if as_of else None
    if moment is None or all(f.last_event_time <= moment for f in files):
        artifact = folder.artifact(files, last.live_digest, last.live_rows)
    else:
        files = [f for f in files if f.first_event_time <= moment]
        names = "\n".join([moment.isoformat(), *sorted(f.sha256 for f in files)])
        artifact = folder.artifact(files, hashlib.sha256(names.encode()).hexdigest(), None)
    return Snapshot(artifact, last.deduplicate, last.number, last.snapshot_id, moment)


def _events(
    folder: Group, state: GroupState, table: TableSpec, record_ids: Collection[str] | None = None
) -> pl.DataFrame:
    """Events of the group, all or those of some records. Columns that older files lack are null.

    Of the files only those row groups are read that may have one of the records.
    """
    lost, sentence = folder.lost_files(state.files)
    if lost:
        raise StepError(f"{sentence}: restore them from a backup, or delete the group and ingest again")
    wanted = event_types(table)
    if state.iceberg is None or state.last is None:
        return pl.DataFrame(schema=wanted)
    row_filter = AlwaysTrue() if record_ids is None else In("record_id", record_ids)  # pyright: ignore[reportCallIssue]
    scan = state.iceberg.scan(row_filter, snapshot_id=state.last.snapshot_id, selected_fields=tuple(wanted))
    own = {file.file_path for file in state.data_files}  # other programs may have added some
    tasks = [task for task in scan.plan_files() if task.file.file_path in own]
    reader = ArrowScan(state.iceberg.metadata, state.iceberg.io, scan.projection(), row_filter)
    events = pl.DataFrame(reader.to_table(tasks))
    return events.select(columns_as(events.schema, wanted))


def _delete_record(folder: Group, record_id: str, event_time: datetime) -> bool:
    state = folder.state()
    last = state.last
    if last is None:
        return False
    table = last.table
    events = _events(folder, state, table, [record_id]).sort(_EVENT_ORDER)
    before = events.filter(pl.col("event_time") <= event_time)
    if not before.height or before["is_deleted"].last():
        return False
    latest, live_digest = events.tail(1), last.live_digest
    dies = before.height == events.height and not latest["is_deleted"].item()
    if dies:
        live_digest = digest_of(subtract_sums(last.live_sums, events_digest(latest, table)))
    with folder.attempt(state, table) as attempt:
        stone = tombstones(pl.Series([record_id]), pl.Series([event_time]).cast(pl.Datetime("us", "UTC")), table)
        path = write_events(stone, attempt.target)
        if not read_back([path], attempt.target)[0]:
            raise StepError(f"the deletion of {record_id} cannot be read back from feature group {folder.name}")
        commit = Commit(
            number=last.number + 1,
            created_at=attempt.target.write_time,
            write_time=attempt.target.write_time,
            table=table,
            deleted=1,
            live_rows=last.live_rows - dies,
            live_digest=live_digest,
            mirrors=False,
            deduplicate=True,
        )
        folder.append(attempt, commit, [path])
    return True
