"""A group's table made anew where it is: after the group has been moved, and from the layout of earlier versions.

Both build a second catalog beside the group's own and put it in place at the end, so that nothing has happened if they
are interrupted, and they can be repeated. On one machine; the group is locked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
from pyiceberg.manifest import ManifestFile, read_manifest_list
from pyiceberg.serializers import FromInputFile
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.snapshots import Snapshot

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.feature_files import attempt_token, events_digest, read_back, write_events
from step_scripts.feature_store.group import FORMAT, REPLAYED_KEY, Commit, GroupInfo, reading
from step_scripts.feature_store.ingestion_plan import WriteTarget
from step_scripts.feature_store.local_group import LocalGroup
from step_scripts.feature_store.stored_types import event_types
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.wording import counted
from step_scripts.table.hashes import add_sums
from step_scripts.table.spec import TableSpec

_BUILDING = "_building.db"


def replay(group: LocalGroup) -> int:
    """Make the table of a moved group anew, snapshot by snapshot, from the files where they are now.

    Reads footers, no data. Snapshots get new ids; the old one is in the summary of each. Returns how many there are.
    Raises `StepError` if files are missing or the metadata cannot be read.
    """
    with group.lock(), reading(group.uri):
        if group.info() is None:
            raise StepError(f"there is no feature group {group.name} in {group.root}")
        before = sorted(group.metadata.iterdir())
        old = _metadata(group)
        building = _fresh(group)
        catalog = iceberg_table.local_catalog(group.path, _BUILDING)
        snapshots = sorted(old.snapshots, key=lambda s: s.sequence_number or 0)
        schemas = {schema.schema_id: schema for schema in old.schemas}
        first = schemas[min(schemas)]
        catalog.create_namespace_if_not_exists(iceberg_table.NAMESPACE)
        catalog.create_table(
            group.identifier,
            first,
            location=f"file://{group.path}",
            partition_spec=old.spec(),
            properties=old.properties,
        )
        present: set[str] = set()
        ids: dict[int, int] = {}
        for snapshot in snapshots:
            table = iceberg_table.load(catalog, group.identifier)
            assert table is not None
            files = set(_paths(group, old, snapshot, table.io))
            sizes = storage.sizes(group.data_uri, sorted(files))
            if lost := sorted(files - sizes.keys()):
                raise StepError(
                    f"{counted(len(lost), 'file')} of feature group {group.name} missing, the first is "
                    f"{storage.join(group.data_uri, lost[0])}: move the whole folder, or restore it from a backup"
                )
            transaction = table.transaction()
            schema = schemas[snapshot.schema_id if snapshot.schema_id is not None else old.current_schema_id]
            with transaction.update_schema() as update:
                update.union_by_name(schema)
            schema = transaction.table_metadata.schema()

            def described(path: str, schema: Any = schema, table: Any = table, sizes: Any = sizes) -> Any:
                uri = storage.join(group.data_uri, path)
                return iceberg_table.described(schema, table.spec(), group.location(uri), uri, sizes[path])

            kept = {k: v for k, v in iceberg_table.summary_of(snapshot).items() if k.startswith("housing.")}
            summary = kept | {REPLAYED_KEY: str(snapshot.snapshot_id)}
            added = [described(path) for path in sorted(files - present)]
            if present - files:
                transaction.commit_transaction()
                current = table.current_snapshot()
                assert current is not None
                gone = {group.location(storage.join(group.data_uri, path)) for path in present - files}
                removed = [f for f in iceberg_table.data_files(table, current) if f.file_path in gone]
                iceberg_table.replace_files(table, removed, added, summary)
            else:
                iceberg_table.append(table, transaction, added, summary)
            current = table.current_snapshot()
            assert current is not None
            ids[snapshot.snapshot_id] = current.snapshot_id
            present = files
        table = iceberg_table.load(catalog, group.identifier)
        assert table is not None
        tags = {name: ref for name, ref in old.refs.items() if ref.snapshot_ref_type == SnapshotRefType.TAG}
        if tags:
            with table.manage_snapshots() as manage:
                for name, ref in tags.items():
                    manage.create_tag(ids[ref.snapshot_id], name)
        if {f.name: f.field_id for f in table.schema().fields} != {f.name: f.field_id for f in old.schema().fields}:
            raise StepError(f"the columns of feature group {group.name} cannot be made as they were; use a backup")
        _put_in_place(building)
        for path in before:
            path.unlink(missing_ok=True)
    return len(snapshots)


def take_over(group: LocalGroup) -> int:
    """Make an Iceberg table of a group in the layout of earlier versions: every commit, with its deletions.

    Data files are written anew, day by day. Returns how many commits there are. Raises `StepError` if there is nothing
    to be taken over, or a file is missing or does not hold what its commit says.
    """
    log = group.path / "_commits"
    info_path = group.path / "group.json"
    with group.lock():
        if not info_path.exists():
            raise StepError(f"there is no feature group {group.name} in {group.root}")
        old_info = json.loads(info_path.read_text())
        if "format" in old_info:
            raise StepError(f"feature group {group.name} in {group.root} has been taken over already")
        texts = [json.loads(path.read_text()) for path in sorted(log.glob("[0-9]*.json"))]
        building = _fresh(group)
        shutil.rmtree(group.metadata, ignore_errors=True)
        old_files = sorted(group.data.rglob("*.parquet")) if group.data.is_dir() else []
        for path in [p for p in old_files if p.parent.name.startswith("event_time_day=")]:
            path.unlink()  # of an attempt before
        created = GroupInfo(
            format=FORMAT,
            name=group.name,
            table=TableSpec.model_validate(texts[0]["table"] if texts else old_info["table"]),
            created_at=old_info["created_at"],
        )
        building._make_table(created)
        for text in texts:
            _take_over_commit(building, text)
        _put_in_place(building)
        info = (
            created.model_copy(update={"table": TableSpec.model_validate(old_info["table"])}) if not texts else created
        )
        storage.write_bytes(str(info_path), info.model_dump_json(indent=2).encode())
        shutil.rmtree(log, ignore_errors=True)
        for folder in group.data.glob("year=*"):
            shutil.rmtree(folder)
    return len(texts)


def _take_over_commit(group: LocalGroup, text: dict[str, Any]) -> None:
    files = text.pop("files")
    commit = Commit.model_validate(text)
    token = attempt_token()
    writing = group.begin(group.state(), commit.table)
    target = WriteTarget(group.data_uri, commit.table, commit.write_time, token, writing.schema, writing.partition)
    types = event_types(commit.table)
    by_day: dict[str, list[str]] = {}
    for file in files:
        by_day.setdefault(file["last_event_time"][:10], []).append(file["path"])
    written, before = [], (0, 0)
    for paths in by_day.values():
        events = pl.concat([_old_events(group, path, types) for path in paths]).sort("record_id", "event_time")
        before = add_sums(before, events_digest(events, commit.table))
        written.append(write_events(events, target))
    stored, after = read_back(group.data_uri, written, commit.table, writing.schema)
    if sum(f.rows for f in stored) != sum(f["rows"] for f in files) or before != after:
        raise StepError(
            f"commit {commit.number} of feature group {group.name} has other events than it should: restore "
            f"{group.data_uri} from a backup, or delete the group and ingest its sources again"
        )
    group.append(writing, commit, stored, token)


def _old_events(group: LocalGroup, path: str, types: dict[str, Any]) -> pl.DataFrame:
    uri = storage.join(group.data_uri, path)
    try:
        frame = pl.read_parquet(uri, hive_partitioning=False, glob=False)
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise StepError(f"{uri} cannot be read ({error}): restore it from a backup, or delete the group") from error
    absent = (pl.lit(None, kind).alias(name) for name, kind in types.items() if name not in frame.columns)
    return frame.with_columns(*absent).select(pl.col(name).cast(kind) for name, kind in types.items())


def _fresh(group: LocalGroup) -> LocalGroup:
    """The group with a catalog of its own that is still empty."""
    for path in group.path.glob(f"{_BUILDING}*"):
        path.unlink()
    building = LocalGroup(group.root, group.name)
    building.database = _BUILDING
    return building


def _put_in_place(building: LocalGroup) -> None:
    (building.path / _BUILDING).replace(building.path / iceberg_table.DATABASE)
    storage.sync(building.uri, [])


def _metadata(group: LocalGroup) -> TableMetadata:
    """The newest metadata of the table: those that the catalog names, or, without it, of the highest version."""
    place = iceberg_table.metadata_place(group.path)
    found = sorted(
        group.metadata.glob("*.metadata.json"), key=lambda p: (int(p.name.partition("-")[0]), p.stat().st_mtime)
    )
    named = group.metadata / Path(place).name if place else (found[-1] if found else None)
    if named is None or not named.exists():
        raise StepError(f"feature group {group.name} has no metadata in {group.metadata}: move the whole folder")
    io = iceberg_table.LocalFileIO({})
    return FromInputFile.table_metadata(io.new_input(f"file://{named}"))


def _paths(group: LocalGroup, old: TableMetadata, snapshot: Snapshot, io: Any) -> Iterator[str]:
    """Data files of a snapshot of moved metadata, relative to the group's `data` folder."""

    def here(place: str) -> str:
        return f"file://{group.path}" + place.removeprefix(old.location.rstrip("/"))

    for manifest in read_manifest_list(io.new_input(here(snapshot.manifest_list))):
        moved = _at(manifest, here(manifest.manifest_path))
        for entry in moved.fetch_manifest_entry(io, discard_deleted=True):
            yield here(entry.data_file.file_path).removeprefix(f"file://{group.data}/")


def _at(manifest: ManifestFile, place: str) -> ManifestFile:
    manifest[0] = place
    return manifest
