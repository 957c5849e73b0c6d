"""Where a feature group is: in a local folder, or on S3 with its table in Glue; and how two writers are kept apart.

Locally, writers hold a lock on the folder itself, so there is no lock file to be left behind; the lock goes with the
process that holds it. On S3 there is no lock: writers work side by side, and the first commits. Glue accepts a change
of a table only on top of the version that it was based on; the loser compares its rows again with what the winner
stored.
Files of a killed writer cannot be told from those of one that is at work, except by their age: what no snapshot has is
deleted after `ORPHAN_AGE`, and a writer that took more than half as long gives up instead of committing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchIcebergTableError, NoSuchPropertyException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import Commit, path_in
from step_scripts.feature_store.events import event_types, file_types
from step_scripts.feature_store.group import COMMAND, LOCK_SECONDS, ORPHAN_AGE, Attempt, Group, GroupInfo
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import discard_folder, private_folder
from step_scripts.runner.locking import try_lock
from step_scripts.runner.s3_objects import delete_objects

_POLL_SECONDS = 0.05
_OWN_NAME = re.compile(r"/[A-Z0-9]{6}-[0-9a-f]{64}\.parquet$")
_REMOVAL = "removal.json"  # there while a group on S3 is being deleted


class LocalGroup(Group):
    """One group below a local folder."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(str(storage.local_path(root).absolute()), name)
        self.path = Path(self.uri)
        self.data = self.path / "data"
        self.metadata = self.path / "metadata"
        self.identifier = (iceberg_table.NAMESPACE, name)
        self.database = iceberg_table.DATABASE

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> Iterator[None]:
        """Be the group's only writer. Raises `StepError` if others hold the lock for longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            if create:
                private_folder(self.path.parent)
                with contextlib.suppress(FileExistsError):  # `exist_ok` still raises if a deletion comes in between
                    self.path.mkdir()
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                if create:
                    continue
                raise StepError(f"there is no feature group {self.name} in {self.path.parent}") from None
            try:
                is_locked = try_lock(descriptor, self.path)
                if self._is_at_path(descriptor):
                    if is_locked:
                        yield
                        return
                    if time.monotonic() > deadline:
                        raise StepError(
                            f"feature group {self.name} is being written to by another run; wait for it, or end it"
                        )
            finally:
                os.close(descriptor)
            time.sleep(_POLL_SECONDS)

    def _is_at_path(self, descriptor: int) -> bool:
        """Whether the open folder is still the one at the group's path: a deletion may have come first."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A scratch folder for the length of the block. The caller holds the lock."""
        folder = self.path / "_staging"
        folder.mkdir()
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def delete_orphan_files(self) -> int:
        """See `Group.delete_orphan_files`. The caller holds the lock, so whatever is not committed is a leftover."""
        shutil.rmtree(self.path / "_staging", ignore_errors=True)
        for temporary in self.path.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        orphans = self.orphan_files(datetime.max.replace(tzinfo=UTC))
        for uri, _ in orphans:
            storage.delete(uri)
        return len(orphans)

    def remove(self) -> None:
        """Delete the group. The caller holds the lock; it is gone at once, however long the removal takes."""
        discard_folder(self.path)

    def catalog(self) -> Catalog:
        """The catalog in the group's folder."""
        return iceberg_table.local_catalog(self.path, self.database)

    def _load(self) -> Table | None:
        command = f"{COMMAND} replay {shlex.quote(self.root)} {self.name}"
        location = iceberg_table.metadata_location(self.path, self.database)
        if location is None:
            if self.database == iceberg_table.DATABASE and any(self.metadata.glob("*.metadata.json")):
                raise StepError(
                    f"the catalog {self.path / iceberg_table.DATABASE} of feature group {self.name} is missing. "
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
        self.delete_orphan_files()  # nobody else's files are uncommitted: the caller holds the lock


class GlueGroup(Group):
    """One group below an s3:// prefix. Where its data and its table are, its description says."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(root.replace("s3a://", "s3://", 1), name)
        self._staging = storage.join(self.uri, "_staging")
        self._began: float | None = None
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

    def append(
        self, attempt: Attempt, commit: Commit, paths: Sequence[str], removed: Sequence[DataFile] = ()
    ) -> Commit:
        """See `Group.append`. Raises `StepError` also if this writer took too long."""
        longest = ORPHAN_AGE.total_seconds() / 2
        if self._began is not None and time.monotonic() - self._began > longest:
            raise StepError(
                f"writing to feature group {self.name} took more than {longest / 3600:.0f} hours, after which "
                "its files may be taken for leftovers. Nothing was committed; ingest with more actors or hosts"
            )
        if self.info() is None:
            raise self._deleted()
        return super().append(attempt, commit, paths, removed)

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> Iterator[None]:
        """Write to the group; others may too."""
        if not create and not self.is_there():
            raise StepError(f"there is no feature group {self.name} in {self.root}")
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    @contextlib.contextmanager
    def staging(self) -> Iterator[str]:
        """A scratch prefix of this writer alone."""
        uri = storage.join(self._staging, uuid.uuid4().hex)
        try:
            yield uri
        finally:
            storage.delete(uri)

    def delete_orphan_files(self) -> int:
        """See `Group.delete_orphan_files`. Only files older than `ORPHAN_AGE`, and none of SageMaker's and Athena's."""
        oldest = datetime.now(UTC) - ORPHAN_AGE
        staged = storage.list_details(self._staging)
        delete_objects(self._staging, [path for path, _, modified in staged if modified < oldest.timestamp()])
        orphans = [path_in(uri, self.data_uri) for uri, _ in self.orphan_files(oldest) if _OWN_NAME.search(uri)]
        delete_objects(self.data_uri, orphans)
        return len(orphans)

    def remove(self) -> None:
        """Delete the group's files: its description first, so that nobody sees a half of it.

        Its table in Glue is dropped by who has had SageMaker make it.
        A marker stays until everything is gone, so that a removal that has failed can be found and repeated.
        """
        data_uri = self.data_uri
        storage.write_bytes(storage.join(self.uri, _REMOVAL), b"{}")
        storage.delete(storage.join(self.uri, "group.json"))
        storage.delete(data_uri)
        delete_objects(self.uri, [path for path, _, _ in storage.list_details(self.uri) if path != _REMOVAL])
        storage.delete(self.uri)

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
        delete_objects(self.data_uri, [p for p in paths if p.rpartition("/")[2].startswith(f"{token}-")])
