"""What a feature store is: groups of records, ingested by a step, read at a point in time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from resources.inventory import OwnedItem
from resources.references.types import DatasetRef, Reference, SnapshotRef
from step_scripts.parameters import IngestionTarget
from step_scripts.runner import storage
from step_scripts.runner.contract import Artifact, StepError
from step_scripts.runner.wording import counted, megabytes
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from step_scripts.feature_store.commits import GroupState
    from step_scripts.feature_store.offline_store import OfflineStore, Upkeep


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
    snapshot_id: int | None = Field(default=None, description="Of the commit, in the group's Iceberg table.")
    run_id: str | None = Field(default=None, description="The run that ingested last.")
    dataset: str | None = Field(default=None, description="Digest of the rows that it ingested.")

    @classmethod
    def of(cls, state: GroupState, as_of: datetime | None = None) -> OfflineSnapshot:
        """The records of a group as it was after its latest commit, of now or of `as_of`."""
        last = state.commits[-1]
        return cls(
            group=state.name,
            artifact=state.artifact(as_of),
            deduplicate=last.deduplicate,
            as_of=as_of,
            commit=last.number,
            snapshot_id=last.snapshot_id,
        )


class FeatureStore(dg.ConfigurableResource, ABC):
    """Keeps feature groups. Rows enter by step `ingest_features`, which is given what `ensure_group` returns.

    Methods raise `step_scripts.runner.contract.StepError` for what the user can put right: a group that is not there,
    another schema, missing files.
    """

    root: str = Field(description="Folder or s3:// prefix of the feature groups.")
    name_suffix: str = Field(default="", description="Suffix of the names of groups whose name is not configured.")

    @abstractmethod
    def ensure_group(self, name: str, table: TableSpec) -> IngestionTarget:
        """Create the group, or check that its schema accepts rows of `table`. Returns the step's `target`."""

    def find_ingestion(self, name: str, dataset_digest: str) -> OfflineSnapshot | None:
        """The records of now, if to ingest the dataset would change nothing, whether mirrored or appended."""
        found = self._store().find_ingestion(name, dataset_digest)
        return OfflineSnapshot.of(found) if found else None

    def offline(self, name: str, as_of: datetime | None = None, commit: int | None = None) -> OfflineSnapshot:
        """The records of now, or of `as_of` (inclusive; in UTC if it has no time zone).

        `commit`: as if later commits, which other runs may make at any time, had not been made.
        """
        from step_scripts.feature_store.commits import as_utc

        return OfflineSnapshot.of(self._store().state(name, commit), as_utc(as_of) if as_of else None)

    def get_record(self, name: str, record_id: str) -> dict[str, Any] | None:
        """The latest state of one record: record_id, event_time and its columns. None if unknown or deleted."""
        return self._store().get_record(name, record_id)

    def compare_online(self, name: str, count: int) -> tuple[int, list[str]] | None:
        """Compare about `count` records of the online store with the offline one; None if there is no online store.

        Returns how many were compared, and the ids of those that differ.
        """
        return None

    def delete_group(self, name: str) -> None:
        """Remove the group with all its records, after any writer has finished."""
        self._store().delete_group(name)

    @abstractmethod
    def inventory(self) -> Sequence[OwnedItem]:
        """All feature groups of this store."""

    @abstractmethod
    def remove(self, item: OwnedItem) -> None:
        """Remove what `inventory` listed; nothing happens if it is gone. Raises `NotOwned` for what is another's."""

    def _store(self) -> OfflineStore:
        from step_scripts.feature_store.offline_store import OfflineStore

        return OfflineStore(self.root)

    def tidy(self, name: str, kept: Collection[int], before: datetime, *, dry_run: bool = False) -> Upkeep:
        """Tag the snapshots of the commits in `kept`, expire others made `before`, remove orphan files after 3 days.

        With `dry_run`, nothing is changed.
        """
        return self._store().tidy(name, kept, before, dry_run=dry_run)

    def compact(self, name: str) -> dict[str, int]:
        """Bring small files together. Returns the numbers of files before and after. Raises `StepError` on S3."""
        return self._store().compact(name)

    def dataset_digests(self, name: str) -> set[str]:
        """Digests of all datasets that have ever been ingested into the group."""
        return {c.dataset_digest for c in self._store().commits(name) if c.dataset_digest is not None}

    def record_dataset(self, name: str, dataset: DatasetRef) -> None:
        """Keep, beside the group, which files a dataset came from. The first record of a dataset stays."""
        uri = self._dataset_uri(name, dataset.digest)
        if not storage.exists(uri):
            storage.write_bytes(uri, dataset.model_dump_json(indent=2).encode())

    def snapshot_lineage(self, snapshot: OfflineSnapshot) -> SnapshotRef:
        """What a snapshot is made of: the datasets whose records it holds, as far as they were recorded."""
        commits = [c for c in self._store().commits(snapshot.group, snapshot.commit) if c.dataset_digest is not None]
        mirrors = [index for index, commit in enumerate(commits) if commit.mirrors]
        if mirrors and snapshot.as_of is None:
            commits = commits[mirrors[-1] :]  # the records of earlier datasets are gone, or are its own
        datasets = {}
        for commit in commits:
            assert commit.dataset_digest is not None
            try:
                data = storage.read_bytes(self._dataset_uri(snapshot.group, commit.dataset_digest))
                found = DatasetRef.model_validate_json(data)
            except FileNotFoundError:
                found = DatasetRef(digest=commit.dataset_digest)
            at = {"commit": commit.number, "ingested_at": commit.created_at}
            datasets[commit.dataset_digest] = found.model_copy(update=at)
        shared = snapshot.model_dump(include=set(SnapshotRef.model_fields))
        return SnapshotRef(**shared, digest=snapshot.artifact.digest, datasets=tuple(datasets.values()))

    def _dataset_uri(self, name: str, digest: str) -> str:
        return storage.join(self._store().folder(name).uri, "_datasets", f"{digest}.json")


def store_item(store: OfflineStore, name: str, arn: str | None = None) -> OwnedItem:
    """A group that is there, as an item of the inventory: also one that cannot be read, so that it can be removed."""
    folder, created_at = store.folder(name), None
    try:
        info, state = folder.info(), folder.state()
        created_at = info.created_at if info else None
        live_rows = state.last.live_rows if state.last else 0
        detail = f"{counted(live_rows, 'record')}, {megabytes(sum(file.bytes for file in state.files))}"
    except StepError as error:  # moved, damaged, of another version
        detail = str(error).splitlines()[0]
    return OwnedItem(kind="feature_group", name=name, location=arn or folder.uri, created_at=created_at, detail=detail)
