"""What keeps a group's table small: expiry of snapshots, removal of orphan files, compaction. The group is locked."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

from step_scripts.feature_store.commits import GroupState, number_of, own_snapshots
from step_scripts.feature_store.events import LARGEST_FILE, Source, file_types, write_anew
from step_scripts.feature_store.group import ORPHAN_AGE, Group
from step_scripts.feature_store.iceberg_table import path_in, reading
from step_scripts.runner import storage
from step_scripts.runner.contract import FileInfo, StepError

_TAG = "kept-"


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
            if tags != present:
                with table.manage_snapshots() as manage:
                    for name, _ in present.items() - tags.items():
                        manage.remove_tag(name)
                    for name, snapshot_id in tags.items() - present.items():
                        manage.create_tag(snapshot_id, name)
            if surplus:
                _keep_facts(group, state, surplus)
                table.maintenance.expire_snapshots().by_ids(list(surplus)).commit()
        orphans = group.orphan_files(datetime.now(UTC) - ORPHAN_AGE, metadata=True)
        if not dry_run:
            for uri, _ in orphans:
                storage.delete_file(uri)
    left = {c.number for c in state.commits if c.snapshot_id is not None and c.snapshot_id not in surplus}
    gone = sorted(set(surplus.values()) - left)  # a compacted commit has two snapshots
    return Upkeep(tuple(gone), tuple(uri for uri, _ in orphans), sum(size for _, size in orphans))


def _keep_facts(group: Group, state: GroupState, surplus: Collection[int]) -> None:
    """Keep what commits changed whose snapshots are about to be expired. That a commit is known twice does no harm."""
    history = {commit.number: commit for commit in group.expired()}
    for commit in state.commits:
        if commit.snapshot_id in surplus:
            history[commit.number] = commit.model_copy(update={"snapshot_id": None})
    facts = [history[number].model_dump(mode="json", exclude_defaults=True) for number in sorted(history)]
    storage.write_bytes(group.expired_uri, json.dumps(facts, indent=1).encode())


def compact(group: Group) -> dict[str, int]:
    """Bring the files of each day together, sorted by record. No event changes; readers see the old files or the new.

    Holds one day at a time. Returns the numbers of files before and after. Raises `StepError` if what was written is
    not what was read, or another program has changed the table meanwhile; on S3, engines beside the data do it.
    """
    if storage.is_remote(group.uri):
        raise StepError(
            f"feature group {group.name} is on S3: let Athena compact it, by OPTIMIZE <table> REWRITE DATA USING "
            "BIN_PACK"
        )
    with group.lock():
        group.info()  # raises for another format
        state = group.state()
        last, before = state.last, len(state.files)
        days: dict[str, list[FileInfo]] = {}
        for file in state.files:
            days.setdefault(file.path.rpartition("/")[0], []).append(file)
        several = [d for d in days.values() if len(d) > max(1, -(-sum(f.rows or 0 for f in d) // LARGEST_FILE))]
        if last is None or not several:
            return {"files_before": before, "files_after": before}
        with group.attempt(state, last.table, last.write_time) as attempt:
            types, written = file_types(attempt.target.schema), list[str]()
            for files in several:
                uris = tuple(storage.join(group.data_uri, file.path) for file in files)
                source = Source(0, uris, sum(file.rows or 0 for file in files), types)
                written += write_anew(source, attempt.target, group.name)
            old = {file.path for files in several for file in files}
            removed = [file for file in state.data_files if path_in(file.file_path, state.data_uri) in old]
            group.append(attempt, last, written, removed)
    return {"files_before": before, "files_after": before - len(old) + len(written)}
