"""The offline store: groups of records, each an Iceberg table of events, read at a point in time.

There is no second copy for look-ups: stored files are sorted by record id, so that one record is found by the
statistics in the files' footers. The online view cannot disagree with the offline one. For the layout on disk see
`step_scripts.feature_store.group`, for ingestion `step_scripts.feature_store.feature_ingestion`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pyarrow.dataset as ds

from step_scripts.feature_store.feature_files import (
    attempt_token,
    content_columns,
    read_back,
    to_microseconds,
    tombstones,
    write_events,
)
from step_scripts.feature_store.feature_ingestion import ingested_by
from step_scripts.feature_store.glue_group import GlueGroup
from step_scripts.feature_store.group import (
    EMPTY_DIGEST,
    GROUP_NAME,
    Commit,
    Group,
    GroupState,
    StoredFile,
    digest_of,
    until_committed,
)
from step_scripts.feature_store.group_schema import adopts, check_columns
from step_scripts.feature_store.ingestion_plan import WriteTarget
from step_scripts.feature_store.local_group import LocalGroup
from step_scripts.feature_store.stored_types import decoded, event_types, file_types
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError
from step_scripts.runner.s3_objects import list_folders
from step_scripts.runner.wording import counted
from step_scripts.table.column_types import TIMESTAMP
from step_scripts.table.hashes import content_hashes, event_hashes, hash_sums, subtract_sums, text_hashes
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
        check_columns(group, table)
        if commits := self.folder(group).commits():
            adopts(group, commits[-1].table, table)

    def commits(self, group: str, upto: int | None = None) -> list[Commit]:
        """The group's commits in order, all or up to a number."""
        return self._existing(group).commits(upto)

    def files(self, group: str, commit: int | None = None) -> list[StoredFile]:
        """Files that make up the group after `commit`, or now."""
        return self._existing(group).state(commit).files

    def scan(self, group: str, as_of: datetime | None = None, commit: int | None = None) -> pl.LazyFrame:
        """Records at a point in time: record_id, event_time and the table's columns, no order.

        `as_of`: the latest event of each record up to this time, inclusive. `commit`: as if later commits had not
        been made. Deleted records are left out.
        """
        folder = self._existing(group)
        state = folder.state(commit)
        table = state.last.table if state.last else self.table(group)
        columns = ["record_id", "event_time", *table.column_names]
        events = _scan(folder, state, table)
        if state.last and state.last.deduplicate:
            events = latest_events(events, as_of)
        elif as_of is not None:
            events = events.filter(pl.col("event_time") <= as_utc(as_of))
        return events.select(columns)

    def snapshot(self, group: str, as_of: datetime | None = None, commit: int | None = None) -> Snapshot:
        """The files to read for the records of now, or of `as_of`. Raises `StepError` if the group has no commit.

        `commit`: as if later commits had not been made.
        """
        folder = self._existing(group)
        state = folder.state(commit)
        last, files = state.last, state.files
        if last is None:
            raise StepError(f"nothing has been ingested into feature group {group} yet")
        if as_of is None or all(f.last_event_time <= as_utc(as_of) for f in files):
            artifact = folder.artifact(files, last.live_digest, last.live_rows)
            return Snapshot(artifact, last.deduplicate, last.number, last.snapshot_id, as_utc(as_of) if as_of else None)
        moment = as_utc(as_of)
        files = [f for f in files if f.first_event_time <= moment]
        names = "\n".join([moment.isoformat(), *sorted(f.sha256 for f in files)])
        artifact = folder.artifact(files, hashlib.sha256(names.encode()).hexdigest(), None)
        return Snapshot(artifact, last.deduplicate, last.number, last.snapshot_id, moment)

    def find_ingestion(self, group: str, dataset_digest: str, *, mirror: bool) -> Snapshot | None:
        """The group's snapshot if to ingest this dataset (again) would change nothing, and no file is missing."""
        folder = self.folder(group)
        if folder.info() is None:
            return None
        state = folder.state()
        if not ingested_by(state.commits, dataset_digest, mirror=mirror) or folder.missing_files(state.files):
            return None
        return self.snapshot(group, commit=len(state.commits))

    def table(self, group: str) -> TableSpec:
        """The group's columns."""
        folder = self._existing(group)
        commits = folder.commits()
        if commits:
            return commits[-1].table
        info = folder.info()
        assert info is not None
        return info.table

    def get_record(self, group: str, record_id: str) -> dict[str, Any] | None:
        """The record's latest event (record_id, event_time, the table's columns); None if unknown or deleted."""
        folder = self._existing(group)
        state = folder.state()
        if state.last is None:
            return None
        table = state.last.table
        found = _events(folder, state, record_id, table)
        latest = found.sort(_EVENT_ORDER).tail(1)
        if not latest.height or latest["is_deleted"].item():
            return None
        return latest.select("record_id", "event_time", *table.column_names).row(0, named=True)

    def sample(self, group: str, count: int) -> pl.DataFrame:
        """The latest events of about `count` records, deletions among them: the first ids of up to ten files.

        Columns: record_id, event_time, the table's columns, is_deleted. Reads a row group or two of each file.
        """
        folder = self._existing(group)
        state = folder.state()
        if state.last is None:
            raise StepError(f"nothing has been ingested into feature group {group} yet")
        table = state.last.table
        files = state.files[:: -(-len(state.files) // _SAMPLED_FILES)]
        share = -(-count // len(files))
        ids = pl.concat(
            _scan(folder, state, table, [file]).select("record_id").head(share).collect()["record_id"] for file in files
        ).unique()
        # Files are sorted by record id: the bound spares the row groups behind it.
        events = _scan(folder, state, table).filter(pl.col("record_id") <= ids.max(), pl.col("record_id").is_in(ids))
        latest = events.sort(_EVENT_ORDER).unique("record_id", keep="last").collect()
        return latest.select("record_id", "event_time", *table.column_names, "is_deleted")

    def delete_record(self, group: str, record_id: str, event_time: datetime) -> bool:
        """Store that the record does not exist from `event_time` on. False, and nothing stored, if it did not then."""
        with self._existing(group).lock():
            return until_committed(lambda: self._delete_record(group, record_id, event_time), logging.info)

    def _delete_record(self, group: str, record_id: str, event_time: datetime) -> bool:
        folder, token = self._existing(group), attempt_token()
        try:
            state = folder.state()
            last = state.last
            if last is None:
                return False
            table = last.table
            events = _events(folder, state, record_id, table).sort(_EVENT_ORDER)
            before = events.filter(pl.col("event_time") <= as_utc(event_time))
            if not before.height or before["is_deleted"].last():
                return False
            was_live, becomes_latest = not events["is_deleted"].last(), before.height == events.height
            dies = was_live and becomes_latest
            write_time = max(datetime.now(UTC), last.write_time + timedelta(microseconds=1))
            time = np.array([to_microseconds(as_utc(event_time))])
            stamp = pl.lit(write_time, TIMESTAMP)
            stone = tombstones(pl.Series([record_id]), time, table).with_columns(
                stamp.alias("write_time"), stamp.alias("api_invocation_time")
            )
            writing = folder.begin(state, table)
            target = WriteTarget(folder.data_uri, table, write_time, token, writing.schema, writing.partition)
            path = write_events(stone, target)
            live_digest = last.live_digest
            if dies:
                live_digest = digest_of(subtract_sums(last.live_sums, _sums(events.tail(1), table)))
            folder.append(
                writing,
                Commit(
                    number=last.number + 1,
                    created_at=datetime.now(UTC),
                    write_time=write_time,
                    dataset_digest=None,
                    table=table,
                    added=0,
                    unchanged=0,
                    superseded=0,
                    deleted=1,
                    live_rows=last.live_rows - dies,
                    live_digest=live_digest,
                    mirrors=False,
                    deduplicate=True,
                ),
                read_back(folder.data_uri, [path], table, writing.schema)[0],
                token,
            )
        except BaseException:
            folder.remove_attempt(token)
            raise
        return True

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
            "columns": {c.name: c.dtype for c in self.table(group).columns},
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


def _events(folder: Group, state: GroupState, record_id: str, table: TableSpec) -> pl.DataFrame:
    """All events of one record."""
    events = _scan(folder, state, table)
    return events.filter(pl.col("record_id") == record_id).collect()


def _scan(
    folder: Group, state: GroupState, table: TableSpec, files: Sequence[StoredFile] | None = None
) -> pl.LazyFrame:
    """All events of the group, or those of some files; columns that older files lack are null."""
    wanted, files = event_types(table), state.files if files is None else files
    if not files:
        return pl.LazyFrame(schema=wanted)
    schema = file_types(folder.begin(state, table).schema)
    if missing := folder.missing_files(files):
        raise StepError(
            f"{len(missing)} of {counted(len(files), 'file')} of feature group {folder.name} missing or cut off, the "
            f"first is {storage.join(folder.data_uri, missing[0].path)}: restore them from a backup, or "
            "delete the group and ingest again"
        )
    paths = [storage.join(folder.data_uri, f.path) for f in files]
    if storage.is_remote(paths[0]):
        # Arrow reads footers first, then only the row groups whose statistics may match; Polars' own reader of S3 knows
        # nothing of `step_scripts.runner.storage`.
        filesystem, _ = storage.filesystem(paths[0])
        arrow_schema = pl.DataFrame(schema=schema).to_arrow(compat_level=pl.CompatLevel.oldest()).schema
        keys = [path.partition("://")[2] for path in paths]
        events = pl.scan_pyarrow_dataset(ds.dataset(keys, arrow_schema, "parquet", filesystem))
    else:
        events = pl.scan_parquet(paths, schema=schema, missing_columns="insert", hive_partitioning=False, glob=False)
    return events.select(decoded(name, schema, wanted) for name in wanted)


def _sums(events: pl.DataFrame, table: TableSpec) -> tuple[int, int]:
    time = events["event_time"].to_physical().to_numpy()
    content = content_hashes(events, content_columns(table))
    return hash_sums(event_hashes(text_hashes(events["record_id"]), time, content))
