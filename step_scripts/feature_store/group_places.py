"""Where a feature group is: in a local folder, or on S3 with its table in Glue; and how two writers are kept apart.

Locally, the table's catalog is an SQLite file in the group's own folder, so that a group is removed, moved and restored
as a whole. Writers lock a file beside the folder, which goes with the group; the lock goes with its holder.
On S3 there is no lock: writers work side by side, and the first commits. Glue accepts a change of a table only on top
of the version that it was based on; the loser compares its rows again with what the winner stored.
Files of a killed writer cannot be told from those of one that is at work, except by their age: what no snapshot has is
deleted after `ORPHAN_AGE`, and a writer that took more than half as long gives up instead of committing.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchIcebergTableError, NoSuchPropertyException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import Commit
from step_scripts.feature_store.events import event_types, file_types
from step_scripts.feature_store.group import COMMAND, ORPHAN_AGE, Attempt, Group, GroupInfo
from step_scripts.feature_store.iceberg_table import path_in
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import discard_folder, file_lock, private_folder

NAMESPACE = "feature_store"
DATABASE = "catalog.db"
LOCK_SECONDS = 600.0
_OWN_NAME = re.compile(r"/[A-Z0-9]{6}-[0-9a-f]{64}\.parquet$")
_REMOVAL = "removal.json"  # there while a group on S3 is being deleted


class LocalGroup(Group):
    """One group below a local folder."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(str(storage.local_path(root).absolute()), name)
        self.path = Path(self.uri)
        self.data = self.path / "data"
        self.metadata = self.path / "metadata"
        self._lock_path = self.path.with_name(f".{name}.lock")
        self.identifier = (NAMESPACE, name)
        self.database = DATABASE

    @contextlib.contextmanager
    def lock(self, *, create: bool = False) -> Iterator[None]:
        """Be the group's only writer. Raises `StepError` if others hold the lock for longer than `LOCK_SECONDS`."""
        with super().lock(create=create), contextlib.ExitStack() as stack:
            try:
                lock = file_lock(self._lock_path, LOCK_SECONDS, "writing to a feature group")
                stack.enter_context(lock)
            except TimeoutError as error:
                raise StepError(
                    f"feature group {self.name} is being written to by another run; wait for it, or end it"
                ) from error
            if create:
                private_folder(self.path)
            yield

    def delete_orphan_files(self) -> int:
        """See `Group.delete_orphan_files`. The caller holds the lock, so whatever is not committed is a leftover."""
        shutil.rmtree(self.path / "_staging", ignore_errors=True)  # of earlier versions
        for temporary in self.path.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        orphans = self.orphan_files(datetime.max.replace(tzinfo=UTC))
        for uri, _ in orphans:
            storage.delete_file(uri)
        return len(orphans)

    def remove(self) -> None:
        """Delete the group. The caller holds the lock; it is gone at once, however long the removal takes."""
        discard_folder(self.path)
        self._lock_path.unlink(missing_ok=True)  # last: who waits for it notices, and takes a new one

    def catalog(self) -> Catalog:
        """The catalog in the group's folder; made if it is not there."""
        from pyiceberg.catalog.sql import SqlCatalog

        io = iceberg_table.LocalFileIO
        places = {"uri": f"sqlite:///{self.path / self.database}", "warehouse": f"file://{self.path}"}
        return SqlCatalog(iceberg_table.CATALOG, **places, **{"py-io-impl": f"{io.__module__}.{io.__name__}"})

    def metadata_location(self) -> str | None:
        """Where the catalog says that the table's metadata are; None if it knows no table."""
        uri = f"{(self.path / self.database).as_uri()}?mode=ro"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
                row = connection.execute("SELECT metadata_location FROM iceberg_tables").fetchone()
        except sqlite3.OperationalError:  # no catalog, or one whose writer was killed while it made it
            return None
        return row[0] if row else None

    def _load(self) -> Table | None:
        command = f"{COMMAND} replay {shlex.quote(self.root)} {self.name}"
        location = self.metadata_location()
        if location is None:
            if self.database == DATABASE and any(self.metadata.glob("*.metadata.json")):
                raise StepError(
                    f"the catalog {self.path / DATABASE} of feature group {self.name} is missing. "
                    f"Restore it from a backup, or make it again from the table's metadata by\n    {command}"
                )
            return None
        if not location.startswith(f"file://{self.metadata}/"):
            raise StepError(
                f"feature group {self.name} has been moved or copied: it is at {self.path}, and its table, which "
                f"holds full paths, says that it is at {location.removeprefix('file://').partition('/metadata/')[0]}. "
                f"Remedy: move it back, or replay its snapshots where it is, which reads no data, by\n    {command}"
            )
        return iceberg_table.load(self.catalog(), self.identifier)

    def _make_table(self, info: GroupInfo) -> None:
        table = self._load()
        if table is not None:
            if file_types(table.schema().as_arrow()) == event_types(info.table):
                return
            table.catalog.drop_table(self.identifier)  # of other columns, and without events
            shutil.rmtree(self.metadata, ignore_errors=True)
        iceberg_table.create(self.catalog(), self.identifier, info.table, f"file://{self.path}")

    def _delete_files_of(self, token: str) -> None:
        for path in self.data.rglob(f"{token}-*"):
            path.unlink()


class GlueGroup(Group):
    """One group below an s3:// prefix. Where its data and its table are, its description says."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(root.replace("s3a://", "s3://", 1), name)
        self._description: dict[str, Any] = {}

    def _place(self, name: str) -> str | None:
        if self._description.get(name) is None:
            self._description = self.described() or {}
        return self._description.get(name)

    @property
    def data_uri(self) -> str:
        """What SageMaker resolved, or the folder's own `data`."""
        return (self._place("data_uri") or super().data_uri).rstrip("/")

    @property
    def identifier(self) -> tuple[str, ...] | None:
        """Database and name of the table in Glue; None before the group is made."""
        table = self._place("glue_table")
        return tuple(table.split(".", 1)) if table is not None else None

    def append(self, attempt: Attempt, commit: Commit, paths: Sequence[str], removed: Sequence[DataFile] = ()) -> None:
        """See `Group.append`. Raises `StepError` also if this writer took too long."""
        if datetime.now(UTC) - attempt.target.write_time > ORPHAN_AGE / 2:
            hours = ORPHAN_AGE.total_seconds() / 7200
            raise StepError(
                f"writing to feature group {self.name} took more than {hours:.0f} hours, after which its files "
                "may be taken for leftovers. Nothing was committed; ingest with more actors or hosts"
            )
        if self.info() is None:
            raise self._deleted()
        super().append(attempt, commit, paths, removed)

    def delete_orphan_files(self) -> int:
        """See `Group.delete_orphan_files`. Only files older than `ORPHAN_AGE`, and none of SageMaker's and Athena's."""
        oldest = datetime.now(UTC) - ORPHAN_AGE
        orphans = [path_in(uri, self.data_uri) for uri, _ in self.orphan_files(oldest) if _OWN_NAME.search(uri)]
        storage.delete_files(self.data_uri, orphans)
        return len(orphans)

    def remove(self) -> None:
        """Delete the group's files: its description first, so that nobody sees a half of it.

        Its table in Glue is dropped by who has had SageMaker make it.
        A marker stays until everything is gone, so that a removal that has failed can be found and repeated.
        """
        data_uri = self.data_uri
        storage.write_bytes(storage.join(self.uri, _REMOVAL), b"{}")
        storage.delete_file(storage.join(self.uri, "group.json"))
        storage.delete_folder(data_uri)
        storage.delete_files(self.uri, [path for path, _, _ in storage.list_details(self.uri) if path != _REMOVAL])
        storage.delete_folder(self.uri)

    def removal_is_incomplete(self) -> bool:
        """Whether the group was to be deleted, and something of it is left."""
        return not self.is_there() and storage.exists(storage.join(self.uri, _REMOVAL))

    def _load(self) -> Table | None:
        if (identifier := self.identifier) is None:
            return None
        from botocore.exceptions import ClientError

        try:
            return iceberg_table.load(iceberg_table.glue_catalog(), identifier)
        except (NoSuchIcebergTableError, NoSuchPropertyException) as error:
            raise StepError(
                f"{'.'.join(identifier)} in AWS Glue, the table of feature group {self.name}, is no Iceberg table. "
                "Drop it and delete the group, or use another group name"
            ) from error
        except ClientError as error:
            refusal = error.response.get("Error", {})
            raise StepError(
                f"reading {'.'.join(identifier)} in AWS Glue, the table of feature group {self.name}, was refused: "
                f"{refusal.get('Code')}: {refusal.get('Message')}"
            ) from error

    def _make_table(self, info: GroupInfo) -> None:
        self._description = info.model_dump()
        if self._load() is None:
            raise StepError(
                f"feature group {self.name} has no table {info.glue_table} in Glue, which SageMaker should have "
                "made. Look at the group in the SageMaker console, delete it, and try again"
            )

    def _delete_files_of(self, token: str) -> None:
        paths = (path for path, _, _ in storage.list_details(self.data_uri))
        storage.delete_files(self.data_uri, [p for p in paths if p.rpartition("/")[2].startswith(f"{token}-")])
