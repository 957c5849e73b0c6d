"""What a feature store is: groups of records, ingested by a step, read at a point in time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from resources.references import Reference
from step_scripts.contract import Artifact
from step_scripts.table import TableSpec

if TYPE_CHECKING:
    from step_scripts.offline_store import Snapshot


class OfflineSnapshot(Reference):
    """The files that hold a group's records at one point in time.

    The digest of `artifact` is that of the records. With `deduplicate`, the files may hold several events of a record
    or its deletion: a reader takes the latest event of each record and leaves out deleted ones. With `as_of`, a reader
    leaves out later events first.
    """

    group: str
    artifact: Artifact
    deduplicate: bool
    as_of: datetime | None = None
    commit: int = Field(description="Number of the group's latest commit.")

    @classmethod
    def of(cls, group: str, snapshot: Snapshot) -> OfflineSnapshot:
        """As a value that assets pass on."""
        return cls(
            group=group,
            artifact=snapshot.artifact,
            deduplicate=snapshot.deduplicate,
            as_of=snapshot.as_of,
            commit=snapshot.commit,
        )


class FeatureStore(dg.ConfigurableResource, ABC):
    """Keeps feature groups. Rows enter by step `ingest_features`, which is given what `ensure_group` returns.

    Methods raise `step_scripts.contract.StepError` for what the user can put right: a group that is not there, another
    schema, missing files.
    """

    name_suffix: str = Field(default="", description="End of the names of groups that nobody named.")

    @abstractmethod
    def ensure_group(self, name: str, table: TableSpec) -> dict[str, Any]:
        """Create the group, or check that its schema accepts rows of `table`. Returns the step's `target`."""

    @abstractmethod
    def find_ingestion(self, name: str, dataset_digest: str) -> Artifact | None:
        """The group's current files, if the group holds exactly this dataset and nothing has changed since."""

    @abstractmethod
    def offline(self, name: str, as_of: datetime | None = None) -> OfflineSnapshot:
        """The records of now, or of `as_of` (inclusive; in UTC if it has no time zone)."""

    @abstractmethod
    def get_record(self, name: str, record_id: str) -> dict[str, Any] | None:
        """The latest state of one record: record_id, event_time and its columns. None if unknown or deleted."""

    @abstractmethod
    def delete_group(self, name: str) -> None:
        """Remove the group with all its records."""

    @abstractmethod
    def describe(self, name: str) -> dict[str, Any]:
        """Facts about the group, as plain data."""
