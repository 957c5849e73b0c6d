"""The offline store: groups of records, each an Iceberg table of events, read at a point in time.

There is no second copy for look-ups: stored files are sorted by record id, so that one record is found by the
statistics in the files' footers. The online view cannot disagree with the offline one.
A table stays small by expiry of snapshots, removal of orphan files, and compaction.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl
from pyiceberg.expressions import In
from pyiceberg.io.pyarrow import ArrowScan

from step_scripts.feature_store.commits import (
    Changes,
    Commit,
    GroupState,
    as_utc,
    is_ingested,
    number_of,
    own_snapshots,
)
from step_scripts.feature_store.events import (
    LARGEST_FILE,
    event_types,
    events_digest,
    row_types,
    tombstones,
    validate_schema_change,
    verify_events,
    write_anew,
    write_events,
)
from step_scripts.feature_store.group import GROUP_NAME, ORPHAN_AGE, Group
from step_scripts.feature_store.group_places import GlueGroup, LocalGroup
from step_scripts.feature_store.iceberg_table import path_in, reading, retry_on_commit_conflict
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.table.column_types import TIMESTAMP, columns_as
from step_scripts.table.spec import TableSpec

_SAMPLED_FILES = 10
_EVENT_ORDER = ("event_time", "api_invocation_time", "write_time")
_TAG = "kept-"


@dataclass(frozen=True)
class Upkeep:
    """Commits whose snapshots have been expired, and paths of orphan files, with their bytes, that were removed."""

    expired: tuple[int, ...]
    orphans: tuple[str, ...]
    bytes: int


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

    def tidy(self, group: str, kept: Collection[int], before: datetime, *, dry_run: bool = False) -> Upkeep:
        """Expire snapshots that were made `before`, and remove orphan files older than `ORPHAN_AGE`.

        The snapshots of the commits in `kept` are tagged, so that nobody's expiry removes them; tags of others go. What
        the expired commits changed stays known. Snapshots of other programs stay, as does the latest. With `dry_run`,
        nothing is changed, and files that only expired snapshots have are not counted.
        """
        folder = self.folder(group)
        with folder.lock(), reading(folder.uri):
            folder.info()  # raises for another format
            state = folder.state()
            table = state.iceberg
            if table is None:
                return Upkeep((), (), 0)
            tags = {f"{_TAG}{c.number}": c.snapshot_id for c in state.commits if c.number in kept and c.snapshot_id}
            current = table.current_snapshot()
            needed = {*tags.values(), current.snapshot_id if current else None}
            old = [s for s in own_snapshots(table) if s.timestamp_ms < before.timestamp() * 1000]
            surplus = {s.snapshot_id: number_of(s) for s in old if s.snapshot_id not in needed}
            if not dry_run:
                present = {name: ref.snapshot_id for name, ref in table.refs().items() if name.startswith(_TAG)}
                with table.manage_snapshots() as manage:  # commits nothing if there is nothing to be changed
                    for name, _ in present.items() - tags.items():
                        manage.remove_tag(name)
                    for name, snapshot_id in tags.items() - present.items():
                        manage.create_tag(snapshot_id, name)
                if surplus:
                    _keep_facts(folder, state, surplus)
                    table.maintenance.expire_snapshots().by_ids(list(surplus)).commit()
            orphans = folder.orphan_files(datetime.now(UTC) - ORPHAN_AGE, metadata=True)
            if not dry_run:
                for uri, _ in orphans:
                    storage.delete_file(uri)
        left = {c.number for c in state.commits if c.snapshot_id is not None and c.snapshot_id not in surplus}
        gone = sorted(set(surplus.values()) - left)  # a compacted commit has two snapshots
        return Upkeep(tuple(gone), tuple(uri for uri, _ in orphans), sum(size for _, size in orphans))

    def compact(self, group: str) -> dict[str, int]:
        """Bring the files of each day together, sorted by record. No event changes; readers see old files or new ones.

        Holds one day at a time. Returns the numbers of files before and after. Raises `StepError` if what was written
        is not what was read, or another program has changed the table meanwhile; on S3, engines beside the data do it.
        """
        folder = self.folder(group)
        if storage.is_remote(folder.uri):
            raise StepError(
                f"feature group {group} is on S3: let Athena compact it, by OPTIMIZE <table> REWRITE DATA USING "
                "BIN_PACK"
            )
        with folder.lock():
            folder.info()  # raises for another format
            state = folder.state()
            last, before = state.last, len(state.files)
            days: dict[str, dict[str, int]] = {}
            for file in state.files:
                days.setdefault(file.path.rpartition("/")[0], {})[file.path] = file.rows or 0
            several = [rows for rows in days.values() if len(rows) > max(1, -(-sum(rows.values()) // LARGEST_FILE))]
            if last is None or not several:
                return {"files_before": before, "files_after": before}
            with folder.attempt(state, last.table, last.write_time) as attempt:
                written = [path for files in several for path in write_anew(files, attempt.target, group)]
                old = {path for files in several for path in files}
                removed = [file for file in state.data_files if path_in(file.file_path, state.data_uri) in old]
                folder.append(attempt, last, written, removed)
        return {"files_before": before, "files_after": before - len(old) + len(written)}

    def _existing(self, group: str) -> Group:
        folder = self.folder(group)
        if folder.info() is None:
            raise self._absent(group)
        return folder

    def _absent(self, group: str) -> StepError:
        return StepError(f"there is no feature group {group} in {self.root}; it has {self.groups() or 'none'}")


def _events(state: GroupState, record_ids: Collection[str]) -> pl.DataFrame:
    """Events of some records of a group that has any. Columns that older files lack are null.

    Of the files only those row groups are read that may have one of the records.
    """
    lost, sentence = state.lost_files()
    if lost:
        raise StepError(f"{sentence}: restore them from a backup, or delete the group and ingest again")
    assert state.iceberg is not None
    last = state.commits[-1]
    wanted = event_types(last.table)
    row_filter = In("record_id", record_ids)  # pyright: ignore[reportCallIssue]
    scan = state.iceberg.scan(row_filter, snapshot_id=last.snapshot_id, selected_fields=tuple(wanted))
    own = {file.file_path for file in state.data_files}  # other programs may have added some
    tasks = [task for task in scan.plan_files() if task.file.file_path in own]
    reader = ArrowScan(state.iceberg.metadata, state.iceberg.io, scan.projection(), row_filter)
    events = pl.DataFrame(reader.to_table(tasks))
    return events.select(columns_as(events.schema, wanted))


def _keep_facts(folder: Group, state: GroupState, surplus: Collection[int]) -> None:
    """Keep what commits changed whose snapshots are about to be expired. That a commit is known twice does no harm."""
    history = {commit.number: commit for commit in folder.expired()}
    for commit in state.commits:
        if commit.snapshot_id in surplus:
            history[commit.number] = commit.model_copy(update={"snapshot_id": None})
    facts = [history[number].model_dump(mode="json", exclude_defaults=True) for number in sorted(history)]
    storage.write_bytes(folder.expired_uri, json.dumps(facts, indent=1).encode())


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
