"""The offline store: groups of records, each an Iceberg table of events, read at a point in time.

There is no second copy for look-ups: stored files are sorted by record id, so that one record is found by the
statistics in the files' footers. The online view cannot disagree with the offline one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import datetime
from typing import Any

import polars as pl
from pyiceberg.expressions import AlwaysTrue, In
from pyiceberg.io.pyarrow import ArrowScan

from step_scripts.feature_store.commits import Changes, Commit, GroupState, as_utc, digest_of, is_ingested
from step_scripts.feature_store.events import (
    event_types,
    events_digest,
    row_types,
    tombstones,
    validate_schema_change,
    verify_events,
    write_events,
)
from step_scripts.feature_store.group import GROUP_NAME, Group
from step_scripts.feature_store.group_places import GlueGroup, LocalGroup
from step_scripts.feature_store.iceberg_table import retry_on_commit_conflict
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.table.column_types import TIMESTAMP, columns_as
from step_scripts.table.spec import TableSpec

_SAMPLED_FILES = 10
_EVENT_ORDER = ("event_time", "api_invocation_time", "write_time")


def latest_events(events: pl.LazyFrame, as_of: datetime | None = None) -> pl.LazyFrame:
    """The latest event of each record up to `as_of`, without deleted records. Columns stay as they are."""
    if as_of is not None:
        events = events.filter(pl.col("event_time") <= as_utc(as_of))
    latest = events.sort(_EVENT_ORDER).unique("record_id", keep="last", maintain_order=False)
    return latest.filter(~pl.col("is_deleted"))


class OfflineStore:
    """The groups below one folder or s3:// prefix.

    Methods raise `StepError` for a group that is not there or damaged.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def groups(self) -> list[str]:
        """Names of all groups."""
        return [folder.name for folder in self._folders() if folder.is_there()]

    def unfinished_removals(self) -> dict[str, str]:
        """What is left on S3 of groups whose removal has failed: places by name."""
        folders = self._folders()
        return {f.name: f.uri for f in folders if isinstance(f, GlueGroup) and f.removal_is_incomplete()}

    def _folders(self) -> list[Group]:
        return [self.folder(name) for name in storage.list_folders(self.root) if GROUP_NAME.fullmatch(name)]

    def folder(self, group: str) -> Group:
        """The group's place, there or not."""
        return GlueGroup(self.root, group) if storage.is_remote(self.root) else LocalGroup(self.root, group)

    def ensure_group(
        self, group: str, table: TableSpec, data_uri: str | None = None, glue_table: str | None = None
    ) -> None:
        """Create the group, or check that its schema accepts rows of `table`: `StepError` names what does not fit.

        On S3 only: `data_uri`, where its data are to be, if not in its own folder, and `glue_table`, the database and
        the table, with a dot between them, that SageMaker has made.
        """
        self.check_table(group, table)
        folder = self.folder(group)
        if folder.state().last is None:
            with folder.lock(create=True):
                if folder.state().last is None:
                    folder.create(table, data_uri, glue_table)

    def check_table(self, group: str, table: TableSpec) -> None:
        """Raise `StepError` if the group is there and does not accept rows of `table`; it names what does not fit."""
        last = self.folder(group).state().last
        validate_schema_change(group, last.table if last else None, table)

    def commits(self, group: str, upto: int | None = None) -> list[Commit]:
        """The group's commits in order, all or up to a number."""
        return self._existing(group).state(upto).commits

    def state(self, group: str, commit: int | None = None) -> GroupState:
        """The group as it is now, or as if later commits than `commit` had not been made: its files and its commits.

        Raises `StepError` if nothing has been ingested.
        """
        state = self._existing(group).state(commit)
        if state.last is None:
            raise StepError(f"nothing has been ingested into feature group {group} yet")
        return state

    def table(self, group: str) -> TableSpec:
        """The group's columns."""
        folder = self._existing(group)
        known = folder.state().last or folder.info()
        assert known is not None
        return known.table

    def scan(self, group: str, as_of: datetime | None = None, commit: int | None = None) -> pl.LazyFrame:
        """Records at a point in time: record_id, event_time and the table's columns, no order.

        `as_of`: the latest event of each record up to this time, inclusive. `commit`: as if later commits had not
        been made. Deleted records are left out. Holds all events in memory; steps read the files of `state`.
        """
        state = self._existing(group).state(commit)
        if state.last is None:
            return pl.LazyFrame(schema=row_types(self.table(group)))
        return latest_events(_events(state).lazy(), as_of).select(*row_types(state.last.table))

    def find_ingestion(self, group: str, dataset_digest: str) -> GroupState | None:
        """The group as it is now if to mirror this dataset (again) would change nothing, and no file is missing."""
        folder = self.folder(group)
        if folder.info() is None:
            return None
        state = folder.state()
        is_known = is_ingested(state.commits, dataset_digest, mirror=True) and not state.lost_files()[0]
        return state if is_known else None

    def get_record(self, group: str, record_id: str) -> dict[str, Any] | None:
        """The record's latest event (record_id, event_time, the table's columns); None if unknown or deleted."""
        state = self._existing(group).state()
        if state.last is None:
            return None
        found = _events(state, [record_id]).sort(_EVENT_ORDER).tail(1)
        live = found.filter(~pl.col("is_deleted")).select(*row_types(state.last.table))
        return live.row(0, named=True) if live.height else None

    def sample(self, group: str, count: int) -> pl.DataFrame:
        """The latest events of about `count` records, deletions among them: the first ids of up to ten files.

        Columns: record_id, event_time, the table's columns, is_deleted. Reads a row group or two of each file.
        """
        state = self.state(group)
        files = state.files[:: -(-len(state.files) // _SAMPLED_FILES)]
        ids = set[str]()
        for file in files:
            with storage.open_input(storage.join(state.data_uri, file.path)) as opened:
                ids.update(pl.read_parquet(opened, columns=["record_id"], n_rows=-(-count // len(files)))["record_id"])
        latest = _events(state, ids).sort(_EVENT_ORDER).unique("record_id", keep="last")
        return latest.drop("write_time", "api_invocation_time")

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
        files, times, last = state.files, state.event_times, state.last
        assert info is not None
        return {
            "name": group,
            "path": folder.uri,
            "data": folder.data_uri,
            "created_at": info.created_at.isoformat(),
            "columns": {c.name: c.dtype for c in (last or info).table.columns},
            "commits": len(state.commits),
            "snapshot_id": last.snapshot_id if last else None,
            "last_commit_at": last.created_at.isoformat() if last else None,
            "live_rows": last.live_rows if last else 0,
            "live_digest": last.live_digest if last else digest_of((0, 0)),
            "events": sum(f.rows or 0 for f in files),
            "deduplicate": last.deduplicate if last else False,
            "files": len(files),
            "bytes": sum(f.bytes for f in files),
            "first_event_time": min(first for first, _ in times).isoformat() if times else None,
            "last_event_time": max(last for _, last in times).isoformat() if times else None,
        }

    def _existing(self, group: str) -> Group:
        folder = self.folder(group)
        if folder.info() is None:
            raise self._absent(group)
        return folder

    def _absent(self, group: str) -> StepError:
        return StepError(f"there is no feature group {group} in {self.root}; it has {self.groups() or 'none'}")


def _events(state: GroupState, record_ids: Collection[str] | None = None) -> pl.DataFrame:
    """Events of a group that has some, all or those of some records. Columns that older files lack are null.

    Of the files only those row groups are read that may have one of the records.
    """
    lost, sentence = state.lost_files()
    if lost:
        raise StepError(f"{sentence}: restore them from a backup, or delete the group and ingest again")
    assert state.iceberg is not None
    last = state.commits[-1]
    wanted = event_types(last.table)
    row_filter = AlwaysTrue() if record_ids is None else In("record_id", record_ids)  # pyright: ignore[reportCallIssue]
    scan = state.iceberg.scan(row_filter, snapshot_id=last.snapshot_id, selected_fields=tuple(wanted))
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
    events = _events(state, [record_id]).sort(_EVENT_ORDER)
    before = events.filter(pl.col("event_time") <= event_time)
    if not before.height or before["is_deleted"].last():
        return False
    gone = events_digest(events.tail(1), last.table) if before.height == events.height else None
    found = Changes(deleted=1, live_rows=-1 if gone else 0, live_removed=gone or (0, 0), further_events=1)
    with folder.attempt(state, last.table) as attempt:
        stone = tombstones(pl.Series([record_id]), pl.Series([event_time]).cast(TIMESTAMP), last.table)
        path = write_events(stone, attempt.target)
        verify_events([path], stone, attempt.target, folder.name)
        folder.append(attempt, state.after(found, attempt.target), [path])
    return True
