"""The feature store in a local folder."""

from __future__ import annotations

from collections.abc import Sequence

from resources.feature_store.base import FeatureStore, store_item
from resources.inventory import NotOwned, OwnedItem, discarded_items, remove_discarded
from step_scripts.parameters import IngestionTarget
from step_scripts.table.spec import TableSpec


class LocalFeatureStore(FeatureStore):
    """Groups below one folder, each an Iceberg table. See `step_scripts.feature_store.offline_store`."""

    def ensure_group(self, name: str, table: TableSpec) -> IngestionTarget:
        """Create the group, or check its schema. Returns the step's `target`."""
        self._store().ensure_group(name, table)
        return IngestionTarget(root=self.root)

    def inventory(self) -> Sequence[OwnedItem]:
        """See `FeatureStore.inventory`."""
        store = self._store()
        return [*(store_item(store, name) for name in store.groups()), *discarded_items(self.root, "feature_group")]

    def remove(self, item: OwnedItem) -> None:
        """See `FeatureStore.remove`."""
        if item.discarded:
            remove_discarded(self.root, item)
            return
        folder = self._store().folder(item.name)
        if item.kind != "feature_group" or item.location != folder.uri:
            raise NotOwned(f"{item.location} is no feature group of this store ({self.root})")
        if folder.is_there():
            self.delete_group(item.name)
