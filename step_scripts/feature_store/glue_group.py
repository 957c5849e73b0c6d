"""A feature group on S3, whose table is in Glue. There is no lock: writers work side by side, and the first commits.

Glue accepts a change of a table only on top of the version that it was based on; the loser compares its rows again with
what the winner stored. Files of a killed writer cannot be told from those of one that is at work, except by their age:
what no snapshot has is deleted after `ORPHAN_AGE`, and a writer that took more than half as long gives up instead
of committing.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from pyiceberg.exceptions import NoSuchIcebergTableError, NoSuchPropertyException
from pyiceberg.table import Table

from step_scripts.feature_store import iceberg_table
from step_scripts.feature_store.commits import Commit
from step_scripts.feature_store.group import LOCK_SECONDS, ORPHAN_AGE, Attempt, Group, GroupInfo
from step_scripts.feature_store.group_state import path_in
from step_scripts.runner import storage
from step_scripts.runner.contract import StepError
from step_scripts.runner.s3_objects import delete_objects, delete_prefix, list_objects
from step_scripts.table.spec import TableSpec

_OWN_NAME = re.compile(r"/[A-Z0-9]{6}-[0-9a-f]{64}\.parquet$")
_REMOVAL = "removal.json"  # there while the group is being deleted


class GlueGroup(Group):
    """One group below an s3:// prefix. `data_uri` may be elsewhere, as the group's description says."""

    def __init__(self, root: str, name: str, data_uri: str | None = None, glue_table: str | None = None) -> None:
        super().__init__(root.replace("s3a://", "s3://", 1), name)
        self._data_uri = data_uri.rstrip("/") if data_uri else None
        self._staging = storage.join(self.uri, "_staging")
        self._began: float | None = None
        self._glue_table = glue_table

    @property
    def data_uri(self) -> str:
        """What was given, else what the group's description says, else the folder's own `data`."""
        if self._data_uri is None:
            self._data_uri = (self.described() or {}).get("data_uri") or storage.join(self.uri, "data")
        return self._data_uri

    @property
    def identifier(self) -> tuple[str, ...] | None:
        """Database and name of the table in Glue; None before the group is made."""
        if self._glue_table is None:
            self._glue_table = (self.described() or {}).get("glue_table")
        return tuple(self._glue_table.split(".", 1)) if self._glue_table is not None else None

    def create(self, table: TableSpec, data_uri: str | None = None, glue_table: str | None = None) -> None:
        """Describe the group, as long as it has no commits. Its data and its table stay unless others are given."""
        self._data_uri = data_uri or self.data_uri
        self._glue_table = glue_table or self._glue_table
        super().create(table, self._data_uri, self._glue_table)

    def append(self, attempt: Attempt, commit: Commit, paths: Sequence[str]) -> Commit:
        """See `Group.append`. Raises `StepError` also if this writer took too long."""
        longest = ORPHAN_AGE.total_seconds() / 2
        if self._began is not None and time.monotonic() - self._began > longest:
            raise StepError(
                f"writing to feature group {self.name} took more than {longest / 3600:.0f} hours, after which "
                "its files may be taken for leftovers. Nothing was committed; ingest with more actors or hosts"
            )
        if self.info() is None:
            raise self._deleted()
        return super().append(attempt, commit, paths)

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
            delete_prefix(uri)

    def delete_orphan_files(self) -> int:
        """See `Group.delete_orphan_files`. Only files older than `ORPHAN_AGE`, and none of SageMaker's and Athena's."""
        oldest = datetime.now(UTC) - ORPHAN_AGE
        delete_objects(self._staging, [o.path for o in list_objects(self._staging) if o.modified < oldest])
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
        delete_objects(self.uri, ["group.json"])
        delete_prefix(data_uri)
        delete_objects(self.uri, [o.path for o in list_objects(self.uri) if o.path != _REMOVAL])
        delete_prefix(self.uri)

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
        if self._load() is None:
            raise StepError(
                f"feature group {self.name} has no table {info.glue_table} in Glue, which SageMaker should have "
                "made. Look at the group in the SageMaker console, delete it, and try again"
            )

    def _delete_files_of(self, token: str) -> None:
        paths = (o.path for o in list_objects(self.data_uri))
        delete_objects(self.data_uri, [p for p in paths if p.rpartition("/")[2].startswith(f"{token}-")])
