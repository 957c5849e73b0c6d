"""Commands for a local feature store: `python -m step_scripts.feature_store replay|import ROOT GROUP`.

`replay` makes the table of a group anew that has been moved, `import` takes over the layout of earlier versions. Both
build a second catalog beside the group's own and put it in place at the end, so that nothing has happened if they are
interrupted, and they can be repeated. On one machine; the group is locked.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from pyiceberg.io.pyarrow import PyArrowFile
from pyiceberg.manifest import DataFile
from pyiceberg.serializers import FromInputFile
from pyiceberg.table import Table
from pyiceberg.table.refs import SnapshotRefType
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.typedef import Properties

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import FORMAT, REPLAYED_KEY, Commit, summary_of
from step_scripts.feature_store.events import write_anew
from step_scripts.feature_store.group import GroupInfo
from step_scripts.feature_store.group_places import DATABASE, NAMESPACE, LocalGroup
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import sync_files
from step_scripts.runner.wording import counted
from step_scripts.table.spec import TableSpec

_BUILDING = "_building.db"


def replay(group: LocalGroup) -> int:
    """Make the table of a moved group anew, snapshot by snapshot, from the files where they are now.

    Reads footers, no data. Snapshots get new ids; the old one is in the summary of each. Returns how many there are.
    Raises `StepError` if files are missing or the metadata cannot be read.
    """
    with group.lock(), iceberg_table.reading(group.uri):
        group.info()  # raises for another format
        before = sorted(group.metadata.iterdir())
        old = _moved_table(group)
        schemas = old.schemas()
        building = _fresh(group)
        catalog = building.catalog()
        catalog.create_namespace_if_not_exists(NAMESPACE)
        table = catalog.create_table(
            group.identifier,
            schemas[min(schemas)],
            location=f"file://{group.path}",
            partition_spec=old.spec(),
            properties=old.properties,
        )
        ids: dict[int, int] = {}
        present: dict[str, DataFile] = {}
        for snapshot in sorted(old.snapshots(), key=lambda s: s.sequence_number or 0):
            files = _files(group, old, snapshot)
            transaction = table.transaction()
            with transaction.update_schema() as update:
                update.union_by_name(schemas.get(snapshot.schema_id or 0, old.schema()))
            kept = {name: value for name, value in summary_of(snapshot).items() if name.startswith("housing.")}
            replayed = iceberg_table.commit(
                table,
                transaction,
                sorted(files - present.keys()),
                kept | {REPLAYED_KEY: str(snapshot.snapshot_id)},
                removed=[file for uri, file in present.items() if uri not in files],
            )
            ids[snapshot.snapshot_id] = replayed.snapshot_id
            present = {entry.data_file.file_path: entry.data_file for entry in iceberg_table.entries(table, replayed)}
        tags = {name: ref for name, ref in old.refs().items() if ref.snapshot_ref_type == SnapshotRefType.TAG}
        if tags:
            with table.manage_snapshots() as manage:
                for name, ref in tags.items():
                    manage.create_tag(ids[ref.snapshot_id], name)
        if {f.name: f.field_id for f in table.schema().fields} != {f.name: f.field_id for f in old.schema().fields}:
            raise StepError(f"the columns of feature group {group.name} cannot be made as they were; use a backup")
        _put_in_place(building)
        for path in before:
            path.unlink(missing_ok=True)
    return len(ids)


def take_over(group: LocalGroup) -> int:
    """Make an Iceberg table of a group in the layout of earlier versions: every commit, with its deletions.

    Data files are written anew, day by day. Returns how many commits there are. Raises `StepError` if there is nothing
    to be taken over, or a file is missing or does not hold what its commit says.
    """
    log = group.path / "_commits"
    with group.lock():
        described = group.described() or {}
        if "format" in described:
            raise StepError(f"feature group {group.name} in {group.root} has been taken over already")
        building = _fresh(group)
        shutil.rmtree(group.metadata, ignore_errors=True)
        for folder in group.data.glob("event_time_day=*"):
            shutil.rmtree(folder)  # of an attempt before
        old = [json.loads(path.read_text()) for path in sorted(log.glob("[0-9]*.json"))]
        table = TableSpec.model_validate(old[0]["table"] if old else described["table"])
        info = GroupInfo(format=FORMAT, name=group.name, table=table, created_at=described["created_at"])
        building._make_table(info)
        for facts in old:
            _take_over_commit(building, facts)
        _put_in_place(building)
        storage.write_bytes(str(group.path / "group.json"), info.model_dump_json(indent=2).encode())
        shutil.rmtree(log, ignore_errors=True)
        for folder in group.data.glob("year=*"):
            shutil.rmtree(folder)
    return len(old)


def _take_over_commit(group: LocalGroup, facts: dict[str, Any]) -> None:
    by_day: dict[str, list[dict[str, Any]]] = {}
    for file in facts.pop("files"):
        by_day.setdefault(file["last_event_time"][:10], []).append(file)
    commit = Commit.model_validate(facts)
    written: list[str] = []
    with group.attempt(group.state(), commit.table, commit.write_time) as attempt:
        for files in by_day.values():
            written += write_anew({file["path"]: file["rows"] for file in files}, attempt.target, group.name)
        group.append(attempt, commit, written)


def _fresh(group: LocalGroup) -> LocalGroup:
    """The group with a catalog of its own that is still empty."""
    for path in group.path.glob(f"{_BUILDING}*"):
        path.unlink()
    building = LocalGroup(group.root, group.name)
    building.database = _BUILDING
    return building


def _put_in_place(building: LocalGroup) -> None:
    (building.path / _BUILDING).replace(building.path / DATABASE)
    sync_files(building.path)


class _MovedFiles(iceberg_table.LocalFileIO):
    """Files whose places begin with property `from`, read where they are now: below `to`."""

    def new_input(self, location: str) -> PyArrowFile:
        return super().new_input(_here(self.properties, location))


def _here(moved: Properties, place: str) -> str:
    return moved["to"] + place.removeprefix(moved["from"])


def _moved_table(group: LocalGroup) -> Table:
    """The table by its newest metadata: those that the catalog names, or, without it, of the highest version."""
    named = group.metadata_location()
    found = sorted(
        group.metadata.glob("*.metadata.json"), key=lambda p: (int(p.name.partition("-")[0]), p.stat().st_mtime)
    )
    newest = group.metadata / Path(named).name if named else (found[-1] if found else None)
    if newest is None or not newest.exists():
        raise StepError(f"feature group {group.name} has no metadata in {group.metadata}: move the whole folder")
    location = f"file://{newest}"
    metadata = FromInputFile.table_metadata(iceberg_table.LocalFileIO({}).new_input(location))
    io = _MovedFiles({"from": metadata.location.rstrip("/"), "to": f"file://{group.path}"})
    return Table(group.identifier, metadata, location, io, group.catalog())


def _files(group: LocalGroup, old: Table, snapshot: Snapshot) -> set[str]:
    """Where the data files of a snapshot are now. Raises `StepError` if one is not there."""
    files = {_here(old.io.properties, entry.data_file.file_path) for entry in iceberg_table.entries(old, snapshot)}
    if lost := sorted(uri for uri in files if not storage.exists(uri)):
        raise StepError(
            f"{counted(len(lost), 'file')} of feature group {group.name} missing, the first is "
            f"{storage.local_path(lost[0])}: move the whole folder, or restore it from a backup"
        )
    return files


_COMMANDS = {"replay": (replay, "snapshot"), "import": (take_over, "commit")}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 1 if it was refused."""
    parser = argparse.ArgumentParser(prog="python -m step_scripts.feature_store", description=__doc__)
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("root", help="folder of the feature groups")
    parser.add_argument("group", help="name of the feature group")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if storage.is_remote(given.root):
            raise StepError(
                f"{given.root} is on S3: a table there is SageMaker's, which can neither be moved nor made of a "
                "feature group that has none. Use another group name and ingest the sources again"
            )
        group = LocalGroup(given.root, given.group)
        function, unit = _COMMANDS[given.command]
        logging.info("%s of %s: %s", given.command, group.path, counted(function(group), unit))
    except StepError as error:
        logging.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
