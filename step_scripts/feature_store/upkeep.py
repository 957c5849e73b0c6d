"""What keeps a group's table small: expiry of snapshots, removal of orphan files, compaction. The group is locked."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

import polars as pl

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import COMPACTED_KEY, INGESTION_KEY, number_of, own_snapshots
from step_scripts.feature_store.data_files import WriteTarget, events_digest, read_back, write_events
from step_scripts.feature_store.event_schema import event_types, file_types
from step_scripts.feature_store.event_sources import Source, read_source
from step_scripts.feature_store.group import ORPHAN_AGE, Group
from step_scripts.feature_store.group_state import GroupState, StoredFile, reading
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted

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
    with group.lock(), reading(group.uri):
        group.info()  # raises for another format
        state = group.state()
        if state.iceberg is None:
            return Upkeep((), (), 0)
        if not dry_run:
            _tag(state, kept)
            state = group.state()
        surplus = _surplus(state, kept, before)
        if surplus and not dry_run:
            _expire(group, state, set(surplus))
        # On S3 the metadata are where SageMaker wants them.
        metadata_uri = None if storage.is_remote(group.uri) else storage.join(group.uri, "metadata")
        orphans = group.orphan_files(datetime.now(UTC) - ORPHAN_AGE, metadata_uri=metadata_uri)
        if not dry_run:
            for uri, _ in orphans:
                storage.delete(uri)
    left = {c.number for c in state.commits if c.snapshot_id is not None and c.snapshot_id not in surplus}
    gone = sorted(set(surplus.values()) - left)  # a compacted commit has two snapshots
    return Upkeep(tuple(gone), tuple(uri for uri, _ in orphans), sum(size for _, size in orphans))


def _surplus(state: GroupState, kept: Collection[int], before: datetime) -> dict[int, int]:
    """Snapshots to expire: their commits' numbers by id."""
    assert state.iceberg is not None
    current = state.iceberg.current_snapshot()
    needed = {c.snapshot_id for c in state.commits if c.number in kept} | {current.snapshot_id if current else None}
    limit = before.timestamp() * 1000
    old = [s for s in own_snapshots(state.iceberg) if s.timestamp_ms < limit and s.snapshot_id not in needed]
    return {snapshot.snapshot_id: number_of(snapshot) for snapshot in old}


def _tag(state: GroupState, kept: Collection[int]) -> None:
    assert state.iceberg is not None
    wanted = {f"{_TAG}{c.number}": c.snapshot_id for c in state.commits if c.number in kept and c.snapshot_id}
    present = {name: ref.snapshot_id for name, ref in state.iceberg.refs().items() if name.startswith(_TAG)}
    if wanted == present:
        return
    with state.iceberg.manage_snapshots() as manage:
        for name, _ in present.items() - wanted.items():
            manage.remove_tag(name)
        for name, snapshot_id in wanted.items() - present.items():
            manage.create_tag(snapshot_id, name)


def _expire(group: Group, state: GroupState, surplus: set[int]) -> None:
    assert state.iceberg is not None
    # Before the expiry: that a commit is known twice does no harm.
    history = {commit.number: commit for commit in group.expired()}
    for commit in state.commits:
        if commit.snapshot_id in surplus:
            history[commit.number] = commit.model_copy(update={"snapshot_id": None})
    facts = [history[number].model_dump(mode="json", exclude_defaults=True) for number in sorted(history)]
    storage.write_bytes(group.expired_uri, json.dumps(facts, indent=1).encode())
    state.iceberg.maintenance.expire_snapshots().by_ids(list(surplus)).commit()


def compact(group: Group) -> dict[str, int]:
    """Bring the files of each day together, sorted by record. No event changes; readers see the old files or the new.

    Holds one day at a time. Returns the numbers of files before and after. Raises `StepError` if what was written is
    not what was read, or another program has changed the table meanwhile.
    """
    with group.lock():
        group.info()  # raises for another format
        state = group.state()
        last, table, before = state.last, state.iceberg, len(state.files)
        days: dict[str, list[StoredFile]] = {}
        for file in state.files:
            days.setdefault(file.path.rpartition("/")[0], []).append(file)
        several = [d for d in days.values() if len(d) > max(1, -(-sum(f.rows for f in d) // _LARGEST_FILE))]
        if last is None or table is None or not several:
            return {"files_before": before, "files_after": before}
        with group.attempt(state, last.table, last.write_time) as attempt:
            written = [path for files in several for path in _compacted(group, files, attempt.target)]
            old = {group.file_location(file.path) for files in several for file in files}
            iceberg_table.commit(
                table,
                attempt.transaction,
                [group.file_location(path) for path in written],
                last.summary(None) | {INGESTION_KEY: attempt.target.token, COMPACTED_KEY: "true"},
                removed=[file for file in state.data_files if file.file_path in old],
            )
    return {"files_before": before, "files_after": before - len(old) + len(written)}


def _compacted(group: Group, files: list[StoredFile], target: WriteTarget) -> list[str]:
    """Write the events of some files of one day anew; the paths of the new files."""
    uris = tuple(storage.join(group.data_uri, file.path) for file in files)
    source = Source(0, uris, 0, sum(file.rows for file in files), file_types(target.schema))
    events = read_source(source, list(event_types(target.table)), target.table)
    ordered = events.sort("record_id", "event_time", "write_time")
    paths = [write_events(part, target) for part in ordered.iter_slices(_LARGEST_FILE)]
    verify_events(paths, events, target, group.name)
    return paths


def verify_events(paths: list[str], events: pl.DataFrame, target: WriteTarget, group: str) -> None:
    """Raise `StepError` unless the written files hold exactly these events."""
    read, sums = read_back(paths, target)
    if sum(rows for _, rows in read) != events.height or sums != events_digest(events, target.table):
        raise StepError(
            f"{counted(events.height, 'event')} of feature group {group} could not be read back after they were "
            "written anew; nothing was changed. Check the storage, then try again"
        )
