"""What keeps a group's table small: expiry of snapshots, removal of orphan files, compaction. The group is locked."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pyiceberg.table import Table

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.event_sources import Source, read_source
from step_scripts.feature_store.feature_files import attempt_token, events_digest, read_back, write_events
from step_scripts.feature_store.group import (
    COMMIT_KEY,
    COMPACTED_KEY,
    INGESTION_KEY,
    Commit,
    Group,
    GroupState,
    StoredFile,
    path_in,
    reading,
)
from step_scripts.feature_store.ingestion_plan import WriteTarget
from step_scripts.feature_store.stored_types import event_types, file_types
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted
from step_scripts.table.hashes import add_sums

ORPHAN_AGE = timedelta(days=3)  # a younger file may belong to a writer that is at work
_TAG = "kept-"
_LARGEST_FILE = 1 << 20  # rows


@dataclass(frozen=True)
class Upkeep:
    """Commits whose snapshots have been expired, and paths of orphan files, with their bytes, that were removed."""

    expired: tuple[int, ...]
    orphans: tuple[str, ...]
    bytes: int


def tidy(group: Group, kept: Collection[int], before: datetime, *, dry_run: bool = False) -> Upkeep:
    """Expire snapshots that were made `before`, and remove orphan files older than `ORPHAN_AGE`.

    The snapshots of the commits in `kept` are tagged, so that nobody's expiry removes them; tags of others go. What the
    expired commits changed stays known. Snapshots of other programs stay, as does the latest. With `dry_run`, nothing
    is changed, and files that only expired snapshots have are not counted.
    """
    with group.lock():
        group.info()  # raises for another format
        state = group.state()
        if state.iceberg is None:
            return Upkeep((), (), 0)
        with reading(group.uri):
            if not dry_run:
                _tag(state, kept)
                state = group.state()
            surplus = _surplus(state, kept, before)
            if surplus and not dry_run:
                _expire(group, state, surplus)
                state = group.state()
            assert state.iceberg is not None
            orphans = _orphans(group, state.iceberg, datetime.now(UTC) - ORPHAN_AGE)
        if not dry_run:
            for uri, _ in orphans:
                storage.delete(uri)
    left = {commit.number for commit in state.commits if commit.snapshot_id not in surplus and commit.snapshot_id}
    gone = sorted({surplus[i] for i in surplus} - left)
    return Upkeep(tuple(gone), tuple(uri for uri, _ in orphans), sum(size for _, size in orphans))


def keep(group: Group, commits: Collection[int]) -> None:
    """Tag the snapshots of these commits; tags of others go. Changes nothing if they are tagged already."""
    with group.lock():
        group.info()  # raises for another format
        state = group.state()
        if state.iceberg is not None:
            with reading(group.uri):
                _tag(state, commits)


def _surplus(state: GroupState, kept: Collection[int], before: datetime) -> dict[int, int]:
    """Snapshots to expire: their commits' numbers by id."""
    assert state.iceberg is not None
    current = state.iceberg.current_snapshot()
    named = {commit.snapshot_id for commit in state.commits if commit.number in kept}
    limit = before.timestamp() * 1000
    return {
        s.snapshot_id: int(iceberg_table.summary_of(s)[COMMIT_KEY])
        for s in iceberg_table.own_snapshots(state.iceberg, COMMIT_KEY)
        if s.snapshot_id not in named and s.timestamp_ms < limit and current is not None and s != current
    }


def _tag(state: GroupState, kept: Collection[int]) -> None:
    table = state.iceberg
    assert table is not None
    wanted = {f"{_TAG}{c.number}": c.snapshot_id for c in state.commits if c.number in kept and c.snapshot_id}
    present = {name: ref.snapshot_id for name, ref in table.refs().items() if name.startswith(_TAG)}
    if wanted == present:
        return
    with table.manage_snapshots() as manage:
        for name in present:
            if wanted.get(name) != present[name]:
                manage.remove_tag(name)
        for name, snapshot_id in wanted.items():
            if present.get(name) != snapshot_id:
                manage.create_tag(snapshot_id, name)


def _expire(group: Group, state: GroupState, surplus: dict[int, int]) -> None:
    assert state.iceberg is not None
    # Before the expiry: that a commit is known twice does no harm.
    history = {commit.number: commit for commit in group.expired()}
    for commit in state.commits:
        if commit.snapshot_id in surplus:
            history[commit.number] = commit.model_copy(update={"snapshot_id": None})
    ordered: list[Commit] = [history[number] for number in sorted(history)]
    text = json.dumps([commit.model_dump(mode="json", exclude_defaults=True) for commit in ordered], indent=1)
    storage.write_bytes(group.expired_uri, text.encode())
    state.iceberg.maintenance.expire_snapshots().by_ids(list(surplus)).commit()


def _orphans(group: Group, table: Table, before: datetime) -> list[tuple[str, int]]:
    """Old files beside the table's own, in its folders, that no snapshot has: URI and size."""
    places = [group.data_uri]
    if not storage.is_remote(group.uri):  # on S3 the metadata are where SageMaker wants them
        places.append(storage.join(group.uri, "metadata"))
    found = [
        (storage.join(place, path), size)
        for place in places
        for path, size, modified in storage.list_details(place)
        if modified < before.timestamp()
    ]
    known = {path_in(uri, "") for uri in iceberg_table.referenced(table)} if found else set[str]()
    return [(uri, size) for uri, size in found if uri.lstrip("/") not in known]


def compact(group: Group) -> dict[str, int]:
    """Bring the files of each day together, sorted by record. No event changes; readers see the old files or the new.

    Holds one day at a time. Returns the numbers of files before and after. Raises `StepError` if what was written is
    not what was read, or another program has changed the table meanwhile.
    """
    token = attempt_token()
    with group.lock():
        group.info()  # raises for another format
        state = group.state()
        last, table = state.last, state.iceberg
        days: dict[str, list[StoredFile]] = {}
        for file in state.files:
            days.setdefault(file.path.rpartition("/")[0], []).append(file)
        several = [
            files for files in days.values() if len(files) > max(1, -(-sum(f.rows for f in files) // _LARGEST_FILE))
        ]
        before = len(state.files)
        if last is None or table is None or not several:
            return {"files_before": before, "files_after": before}
        try:
            stored = [file for files in several for file in _compacted(group, state, last, files, token)]
            old = {file.path for files in several for file in files}
            current = state.snapshot(last.number)
            removed = [
                f for f in iceberg_table.data_files(table, current) if path_in(f.file_path, group.data_uri) in old
            ]
            added = [
                iceberg_table.described(table.schema(), table.spec(), group.location(uri), uri, file.bytes)
                for file in stored
                for uri in [storage.join(group.data_uri, file.path)]
            ]
            summary = last.summary(None) | {INGESTION_KEY: token, COMPACTED_KEY: "true"}
            iceberg_table.replace_files(table, removed, added, summary)
        except BaseException:
            group.remove_attempt(token)
            raise
    return {"files_before": before, "files_after": before - len(old) + len(stored)}


def _compacted(group: Group, state: GroupState, last: Commit, files: list[StoredFile], token: str) -> list[StoredFile]:
    writing = group.begin(state, last.table)
    target = WriteTarget(group.data_uri, last.table, last.write_time, token, writing.schema, writing.partition)
    uris = tuple(storage.join(group.data_uri, file.path) for file in files)
    source = Source(0, uris, 0, sum(file.rows for file in files), file_types(writing.schema))
    events = read_source(source, list(event_types(last.table)), last.table).sort(
        "record_id", "event_time", "write_time"
    )
    paths = [write_events(part, target) for part in events.iter_slices(_LARGEST_FILE)]
    stored, sums = [], (0, 0)
    for path in paths:
        described, part = read_back(group.data_uri, [path], last.table, writing.schema)
        stored += described
        sums = add_sums(sums, part)
    if sum(file.rows for file in stored) != events.height or sums != events_digest(events, last.table):
        raise StepError(
            f"{counted(events.height, 'event')} of feature group {group.name} could not be read back after compaction; "
            "nothing was changed. Check the storage, then compact again"
        )
    return stored
