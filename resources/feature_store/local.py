"""The feature store in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from resources.feature_store.base import FeatureStore, store_item
from resources.inventory import NotOwned, OwnedItem, discarded_items, remove_discarded
from step_scripts.table.spec import TableSpec

if TYPE_CHECKING:
    from step_scripts.feature_store.offline_store import OfflineStore


class LocalFeatureStore(FeatureStore):
    """Groups below one folder, each an Iceberg table. See `step_scripts.feature_store.offline_store`."""

    root: str = Field(description="Folder of the feature groups; made if it is not there.")
    mirror: bool = Field(
        default=False,
        description="Whether records that an ingested dataset lacks are deleted; an asset may decide otherwise.",
    )

    def ensure_group(self, name: str, table: TableSpec) -> dict[str, Any]:
        """Create the group, or check its schema. Returns the step's `target`."""
        self._store().ensure_group(name, table)
        return {"root": self.root, "mirror": self.mirror}

    def get_record(self, name: str, record_id: str) -> dict[str, Any] | None:
        """The latest state of one record; None if unknown or deleted."""
        return self._store().get_record(name, record_id)

    def delete_group(self, name: str) -> None:
        """Remove the group with all its records, after any writer has finished."""
        self._store().delete_group(name)

    def describe(self, name: str) -> dict[str, Any]:
        """Schema, size, span of event times, number of commits."""
        return self._store().describe(name)

    def inventory(self) -> Sequence[OwnedItem]:
        """See `FeatureStore.inventory`."""
        store = self._store()
        return [*(store_item(store, name) for name in store.groups()), *discarded_items(self.root, "feature_group")]

    def remove(self, item: OwnedItem) -> None:
        """See `FeatureStore.remove`."""
        if item.discarded:
            remove_discarded(self.root, item)
            return
        store = self._store()
        folder = store.folder(item.name)
        if item.kind != "feature_group" or item.location != folder.uri:
            raise NotOwned(f"{item.location} is no feature group of this store ({self.root})")
        if folder.is_there():
            store.delete_group(item.name)

    def _store(self) -> OfflineStore:
        from step_scripts.feature_store.offline_store import OfflineStore

        return OfflineStore(self.root)
