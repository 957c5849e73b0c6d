"""A feature group in a local folder. Writers hold a lock on the folder itself, so there is no lock file to be left
behind; the lock goes with the process that holds it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.event_schema import iceberg_schema
from step_scripts.feature_store.group import COMMAND, LOCK_SECONDS, Group, GroupInfo
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.local_files import private_folder, try_lock

_POLL_SECONDS = 0.05


class LocalGroup(Group):
    """One group below a local folder."""

    def __init__(self, root: str, name: str) -> None:
        super().__init__(str(storage.local_path(root).absolute()), name)
        self.path = Path(self.uri)
        self.data = self.path / "data"
        self.metadata = self.path / "metadata"
        self.identifier = (iceberg_table.NAMESPACE, name)
        self.database = iceberg_table.DATABASE
        self._staging = self.path / "_staging"

    @property
    def data_uri(self) -> str:
        """The `data` folder."""
        return str(self.data)

    @contextlib.contextmanager
    def lock(self, seconds: float = LOCK_SECONDS, *, create: bool = False) -> Iterator[None]:
        """Be the group's only writer. Raises `StepError` if others hold the lock for longer than `seconds`.

        Without `create`, also if there is no such group.
        """
        deadline = time.monotonic() + seconds
        descriptor = self._locked_descriptor(deadline, create)
        try:
            yield
        finally:
            os.close(descriptor)

    def _locked_descriptor(self, deadline: float, create: bool) -> int:
        """The group's folder, open and locked. A folder that was deleted meanwhile is opened, or made, again."""
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
                if try_lock(descriptor, self.path) and self._is_at_path(descriptor):
                    return descriptor
                if time.monotonic() > deadline and self._is_at_path(descriptor):
                    raise StepError(
                        f"feature group {self.name} is being written to by another run; wait for it, or end it"
                    )
            except BaseException:
                os.close(descriptor)
                raise
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
        folder = self._staging / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield str(folder)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def delete_orphan_files(self) -> int:
        """See `Group.delete_orphan_files`. The caller holds the lock, so whatever is not committed is a leftover."""
        shutil.rmtree(self._staging, ignore_errors=True)
        for temporary in self.path.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)
        orphans = self.orphan_files(datetime.max.replace(tzinfo=UTC))
        for uri, _ in orphans:
            storage.delete(uri)
        return len(orphans)

    def remove(self) -> None:
        """Delete the group. The caller holds the lock; it is gone at once, however long the removal takes."""
        storage.discard_folder(self.path)

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
        if table is not None and table.schema() == iceberg_schema(info.table):
            return
        if table is not None:  # of other columns, and without events
            table.catalog.drop_table(self.identifier)
            shutil.rmtree(self.metadata, ignore_errors=True)
        iceberg_table.create(self.catalog(), self.identifier, info.table, f"file://{self.path}")

    def _delete_files_of(self, token: str) -> None:
        self.delete_orphan_files()  # nobody else's files are uncommitted: the caller holds the lock
